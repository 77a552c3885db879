"""Results on disk: what is saved is what is read, and what is no result is refused in a sentence."""

from __future__ import annotations

import json
from math import inf, isnan, nan
from pathlib import Path
from typing import Any

import pytest

from anysize.errors import InputError
from anysize.report.schema import Results
from tests.report.samples import looking_real, small


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    results = small("random", "o'u\"rs")
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path) == results == Results.load(tmp_path / "results.json")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_loss_that_is_not_finite_comes_back_as_such(tmp_path: Path) -> None:
    looking_real().save(tmp_path / "results.json")
    again = Results.load(tmp_path)
    ends = [run.test[-1] for run in again.runs if run.status == "diverged"]
    assert ends
    assert all(isnan(value) for value in ends)


def edited(**changes: Any) -> dict[str, Any]:
    return {**small().model_dump(mode="json"), **changes}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("not json", "holds no results of a comparison"),
        ("{}", "holds no results of a comparison: title: Field required"),
        (json.dumps(edited(format=2)), "format: Input should be 1"),
        (json.dumps(edited(colour="red")), "colour: Extra inputs are not permitted"),
        (json.dumps(edited(goals=["randon"])), "no arm has the name 'randon' (did you mean 'random'?)"),
        (json.dumps(edited(arms=small().model_dump(mode="json")["arms"][:1] * 2)), "two arms have the same name"),
        (
            json.dumps(edited(runs=[{**small().model_dump(mode="json")["runs"][0], "test": [1.0]}])),
            "a run of 'random' has 4, 4 and 1 values of at, validation and test",
        ),
        (
            json.dumps(edited(runs=[{**small().model_dump(mode="json")["runs"][0], "at": [-5, 1, 2, 3]}])),
            "a run of 'random' was measured at (-5, 1, 2, 3): wanted steps that rise from 0",
        ),
        (json.dumps(edited(steps=-800)), "steps: Input should be greater than or equal to 1"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, content: str, sentence: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(InputError) as error:
        Results.load(tmp_path)
    assert sentence in str(error.value)


@pytest.mark.parametrize("value", [nan, inf])
@pytest.mark.parametrize(
    "place",
    ["metric.bits_per_byte", "runs.0.train_s", "rows.1.reached.random.steps_share",
     "rows.1.reached.random.seconds_share", "rows.0.after", "arms.0.calibration_s"],
)  # fmt: skip
def test_a_figure_that_is_not_finite_is_refused(tmp_path: Path, place: str, value: float) -> None:
    content: Any = edited()
    *sections, last = place.split(".")
    inner = content
    for section in sections:
        inner = inner[int(section) if section.isdigit() else section]
    inner[last] = value
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        Results.load(tmp_path)
    assert f"{place}: Input should be a finite number" in str(error.value)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the results '.*results\.json'"):
        Results.load(tmp_path)
    (tmp_path / "results.json").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="cannot read the results"):
        Results.load(tmp_path)
