"""What can be refused from configs and places alone is refused before a source is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import anysize
from anysize.calibration import calibrate, evolution
from anysize.calibration.scores import Scores
from anysize.errors import CheckpointError, InputError
from anysize.vocabulary.ids import renumbered


@pytest.fixture
def _runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("the source was run")

    monkeypatch.setattr(calibrate, "calibrated", run)
    monkeypatch.setattr(evolution, "searched", run)


@pytest.mark.usefixtures("_runs_nothing")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_hidden_layers": 1, "layers": "bogus"}, "'bogus' is neither"),
        ({"num_hidden_layers": 1, "layers": "0,1"}, "lists 2 layers, but num_hidden_layers is 1"),
        ({"num_hidden_layers": 1, "layers": "stack"}, "'stack' adds layers"),
        ({"num_hidden_layers": 3, "intermediate_size": 24, "layers": "angular"}, "'angular' drops layers"),
        (
            {"intermediate_size": 24, "preset": "weight-selection"},
            "preset 'weight-selection', .* without it",
        ),
        ({"intermediate_size": 24, "select": "weight", "readers": "none"}, "select 'weight', .* without it"),
        ({"num_hidden_layers": 1, "preset": "subcloning"}, "preset 'subcloning', .* without it"),
    ],
)
def test_layers_that_cannot_be(llama: Path, text: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        anysize.plan(llama, calibration=text, **asked)


@pytest.mark.usefixtures("_runs_nothing")
def test_an_output_that_holds_something(llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("kept")
    with pytest.raises(InputError, match="is not empty"):
        anysize.resize(llama, tmp_path, calibration=text, intermediate_size=24)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


@pytest.mark.usefixtures("_runs_nothing")
def test_too_few_samples_before_a_search(llama: Path, scores: Scores) -> None:
    few = replace(scores, record=scores.record.model_copy(update={"samples": 10}))
    with pytest.raises(InputError, match="too few to fit what reads the 24 kept coordinates of ffn"):
        anysize.plan(llama, calibration=few, num_hidden_layers=1, intermediate_size=24, layers="evolutionary")


@pytest.mark.parametrize(
    "odd", [{"suppress_tokens": 5}, {"suppress_tokens": [[1]]}, {"bad_words_ids": [5]}, {"bad_words_ids": 5},
            {"eos_token_id": "1"}, {"eos_token_id": [1.0]}]
)  # fmt: skip
def test_ids_in_another_form_than_ids(odd: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"wanted a list of token ids"):
        renumbered(odd, {1: 0, 5: 1})
    fine = {"suppress_tokens": [5, 7], "bad_words_ids": [[1, 5], [7]], "eos_token_id": [1]}
    assert renumbered(fine, {1: 0, 5: 1}) == {"suppress_tokens": [1], "bad_words_ids": [[0, 1]], "eos_token_id": [0]}


def test_an_empty_wish_for_tokens(llama: Path) -> None:
    with pytest.raises(InputError, match="keep_tokens is empty"):
        anysize.plan(llama, keep_tokens="")


def test_what_is_no_model_is_not_verified(llama: Path) -> None:
    with pytest.raises(InputError, match="the source is a int, wanted a folder, a Hub id or a transformers model"):
        anysize.verify(llama, 42)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "asked",
    [
        {"select": "weight", "readers": "none"},
        {"select": "random", "readers": "fan-in"},
        {"preset": "subcloning", "select": "stride", "readers": "none"},
        {"preset": "weight-selection"},
    ],
)
def test_scores_that_lie_ready_and_are_not_read_are_told(
    llama: Path, tied_llama: Path, scores: Scores, tmp_path: Path, asked: dict[str, Any]
) -> None:
    asked = {"intermediate_size": 24, **asked}
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    plain = anysize.plan(llama, **asked)
    for ready in (scores, path):
        plan = anysize.plan(llama, calibration=ready, **asked)
        (note,) = plan.notes
        assert note.startswith("the calibration is not used: preset '")
        assert (plan.recipes, plan.axes, plan.scores_sha256) == (plain.recipes, plain.axes, "")
    # They are looked at all the same, and what runs the source is refused.
    with pytest.raises(CheckpointError, match="the scores were made for another model"):
        anysize.plan(tied_llama, calibration=path, **asked)
    with pytest.raises(CheckpointError, match="does not exist"):
        anysize.plan(llama, calibration=tmp_path / "none.safetensors", **asked)
    with pytest.raises(InputError, match="choose and fit without it; leave it out"):
        anysize.plan(llama, calibration=lambda: scores, **asked)
