"""What growing adds to a config that is silent about it, and to none that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anysize.config import SourceConfig, understand
from anysize.errors import InputError
from anysize.io.reader import Checkpoint
from anysize.training.config import Distill, TrainConfig, train_config
from anysize.training.config_file import read_yaml
from anysize.training.gentle import DISTILL, NOTE, RECIPE, gently
from anysize.training.trainer import AnysizeTrainer
from tests import tiny
from tests.conftest import Ran
from tests.training.test_run import config_of, record, written
from tests.training.test_run import story as story

Run = Callable[..., Ran]
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}


def asked(**changes: Any) -> TrainConfig:
    return train_config({"output": "o", "resize": {"source": "s"}, "data": {"train": "t"}, **changes}, "c.yaml")


def sizes(llama: Path, **changes: int) -> SourceConfig:
    return understand({**Checkpoint(llama).config, **changes})


def test_a_silent_config_grows_gently(llama: Path) -> None:
    source, target = sizes(llama, intermediate_size=64), sizes(llama, intermediate_size=96)
    found, note = gently(asked(), "auto", {}, lambda: (source, target))
    assert (found.distill, found.recipe, note) == (DISTILL, RECIPE, NOTE)


@pytest.mark.parametrize(
    ("changes", "preset", "target"),
    [
        ({"distill": None}, "auto", {"intermediate_size": 96}),
        ({"recipe": {}}, "auto", {"intermediate_size": 96}),
        ({}, "fresh", {"intermediate_size": 96}),
        ({}, "hypercloning", {"intermediate_size": 96}),
        ({}, "auto", {"num_hidden_layers": 5}),
        ({}, "auto", {"intermediate_size": 96, "vocab_size": 70}),
        ({}, "auto", {"intermediate_size": 40}),
        ({}, "auto", {"intermediate_size": 96, "hidden_size": 16}),
    ],
)
def test_what_is_said_or_does_not_grow_in_width_is_left_alone(
    llama: Path, changes: dict[str, Any], preset: str, target: dict[str, int]
) -> None:
    before = asked(**changes)
    source = sizes(llama, intermediate_size=64)
    after = sizes(llama, **{"intermediate_size": 64, **target})
    assert gently(before, preset, {}, lambda: (source, after)) == (before, "")


def test_what_cannot_be_trained_so_is_told() -> None:
    tensors = tiny.source(next(v for v in tiny.VARIANTS if v.family == "mixtral"))
    source = understand(tensors.config)
    target = understand({**source.full, "intermediate_size": 58})
    found, note = gently(asked(), "auto", {}, lambda: (source, target))
    assert found == asked()
    assert "not grown gently: transformers fuses or renames" in note


@pytest.mark.parametrize(
    ("training", "told"),
    [({"fsdp": True}, "shards"), ({"deepspeed": "d.json"}, "shards"), ({"optim": "adafactor"}, "optim is adafactor")],
)
def test_what_a_run_cannot_do_is_told(llama: Path, training: dict[str, Any], told: str) -> None:
    source, target = sizes(llama, intermediate_size=64), sizes(llama, intermediate_size=96)
    assert told in gently(asked(), "auto", training, lambda: (source, target))[1]


def test_a_run_says_that_it_grew_gently_and_listens_for_half_of_it(
    llama: Path, story: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    plain_loss = AnysizeTrainer._with_teacher

    def counted(self: AnysizeTrainer, *arguments: Any) -> torch.Tensor:
        heard.append(self.state.global_step)
        return plain_loss(self, *arguments)

    monkeypatch.setattr(AnysizeTrainer, "_with_teacher", counted)
    config = config_of(
        llama, story, tmp_path / "out", resize={"source": str(llama), **WIDER}, training={"max_steps": 4}
    )
    config.pop("model")
    path = written(tmp_path / "c.yaml", config)
    done = cli("train", path)
    assert done.code == 0, done.err
    assert done.err.index("grown gently") < done.err.index("train ...")
    found = record(tmp_path / "out")
    assert found["config"]["distill"]["until_step"] == 0.5
    assert found["config"]["recipe"]["new_parameters"]["old_learning_rate_factor"] == 0.1
    assert found["teacher_s"] > 0
    assert heard == [0, 1]
    assert "grown gently" in cli("train", path, "--plan-only").out
    plain = cli("train", path, "--set", f"output={tmp_path / 'plain'}", "--set", "recipe={}")
    assert plain.code == 0, plain.err
    assert "grown gently" not in plain.err
    assert record(tmp_path / "plain")["teacher_s"] == 0


def test_a_run_goes_on_as_it_began(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    config = config_of(
        llama, story, tmp_path / "out", resize={"source": str(source), **WIDER}, training={"max_steps": 4}
    )
    config.pop("model")
    path = written(tmp_path / "c.yaml", config)
    assert cli("train", path).code == 0
    before = record(tmp_path / "out")
    # A finished run is told again without its source, and one that names what was left to us is another run.
    shutil.rmtree(source)
    again = cli("train", path, "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["losses"] == before["losses"]
    other = cli("train", path, "--set", "recipe={}")
    assert other.code == 2
    assert "is of another config (distill, recipe differ)" in other.err


def test_a_start_that_is_not_there_leaves_nothing(story: Path, tmp_path: Path, cli: Run) -> None:
    config = config_of(tmp_path, story, tmp_path / "out", resize={"source": str(tmp_path / "no"), **WIDER})
    config.pop("model")
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert done.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("until", [1.0, 1.5, 0, -2, "soon"])
def test_what_is_no_number_of_steps_is_refused(until: object) -> None:
    with pytest.raises(InputError, match=r"until_step: Input|until_step is 1"):
        asked(distill={"until_step": until})


@pytest.mark.parametrize(("until", "taught"), [(None, 10), (0.5, 5), (0.01, 1), (1, 1), (4, 4), (40, 10)])
def test_a_teacher_is_heard_for_a_share_or_a_number_of_steps(until: float | None, taught: int) -> None:
    assert Distill(until_step=until).steps_taught(10) == taught


def test_the_benchmark_measures_what_is_done() -> None:
    arms = read_yaml(Path(__file__).parents[2] / "benchmarks" / "train" / "grow.yaml")["arms"]
    distill, recipe = arms["fresh, gentle"]["distill"], arms["fresh, gentle"]["recipe"]
    assert {**distill, "until_step": distill["until_step"] / 1000} == DISTILL.model_dump(exclude_unset=True)
    assert recipe == RECIPE.model_dump(exclude_unset=True)
