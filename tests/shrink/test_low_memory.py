"""Fitting with one layer in memory, and with nothing in memory that can lie on disk: the same plan, to the last bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import anysize
from anysize.calibration.replay import Layers, Read
from anysize.calibration.scores import Scores
from anysize.config import SourceConfig, understand
from anysize.dense import DenseMaps
from anysize.errors import CheckpointError, SizeError
from anysize.io.reader import Checkpoint
from anysize.recipe import Plan
from anysize.sequential import most_items, working_bytes
from anysize.stored import ScratchArrays
from anysize.tensors import Expected

HALF: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
GAP: dict[str, Any] = {"hidden_size": 28, "num_hidden_layers": 1, "layers": "1"}


class Whole(Layers):
    """All layers in memory all of the time, and run as the model runs them to see how it calls them."""

    def __init__(self, config: SourceConfig, read: Read, device: torch.device) -> None:
        super().__init__(config, read, device)
        self.whole = ExitStack()
        self.whole.enter_context(super().holding(self.expected.values()))

    @contextmanager
    def holding(self, tensors: Iterable[Expected]) -> Generator[None]:
        del tensors
        yield


def equal(one: Plan, other: Plan) -> bool:
    return one.to_json() == other.to_json() and one.dense == other.dense


@pytest.mark.parametrize("sizes", [HALF, GAP], ids=["half", "layers dropped before and after"])
def test_one_layer_at_a_time_gives_what_whole_models_give(
    llama: Path, scores: Scores, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = anysize.plan(llama, calibration=scores, **sizes)
    assert plan.options.readers == "sequential"
    monkeypatch.setattr("anysize.sequential.Layers", Whole)
    monkeypatch.setattr("anysize.calibration.replay.without", lambda _layers: nullcontext())
    assert equal(plan, anysize.plan(llama, calibration=scores, **sizes))


def test_no_more_than_one_layer_is_there(llama: Path) -> None:
    read: list[str] = []
    source = Checkpoint(llama)

    def reading(name: str) -> torch.Tensor:
        read.append(name)
        return source.read(name)

    layers = Layers(understand(source.config), reading)

    def there() -> set[str]:
        return {name for name, parameter in layers.model.named_parameters() if parameter.device.type != "meta"}

    assert not there()
    layers.start([{"input_ids": torch.arange(12).reshape(2, 6)}])
    assert read == ["model.embed_tokens.weight", "model.norm.weight"]
    assert not there()
    with layers.layer(1):
        assert there() == {name for name in source.tensors if ".layers.1." in name}
        after = layers.replay(1, 0)
    assert not there()
    assert after.shape == (2, 6, 32)
    assert not after.equal(layers.stream[0])


def test_what_is_fitted_into_a_layer_leaves_the_source_as_it_was(llama: Path) -> None:
    values = torch.ones(32)
    layers = Layers(understand(Checkpoint(llama).config), lambda _name: values)
    norm = next(e for e in layers.expected.values() if e.name == "model.norm.weight")
    with layers.holding([norm]), torch.no_grad():
        parameter: Any = layers.module("model.norm").weight
        parameter.zero_()
    assert values.equal(torch.ones(32))


@pytest.fixture
def saved(scores: Scores, tmp_path: Path) -> Path:
    scores.save(tmp_path / "scores.safetensors")
    return tmp_path / "scores.safetensors"


def test_low_memory_gives_the_same_plan_and_keeps_its_matrices_on_disk(
    llama: Path, saved: Path, tmp_path: Path
) -> None:
    usual, low = (anysize.plan(llama, calibration=saved, low_memory=low, **HALF) for low in (False, True))
    assert equal(usual, low)
    assert usual.dense.resident_bytes == usual.dense.num_bytes == low.dense.num_bytes
    assert low.dense.resident_bytes == max(array.nbytes for array in usual.dense.values())
    other = anysize.plan(llama, calibration=saved, low_memory=True, **(HALF | {"hidden_size": 20}))
    assert not equal(usual, other)
    for name, plan in (("usual", usual), ("low", low)):
        anysize.apply(plan, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("usual", "low"))
    assert one == two


def test_a_plan_from_disk_saves_loads_and_saves_again(llama: Path, saved: Path, tmp_path: Path) -> None:
    plan = anysize.plan(llama, calibration=saved, low_memory=True, **HALF)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert equal(again, plan)
    again.save(tmp_path / "plan.json")
    DenseMaps({"other": np.ones(3, np.float32)}).save(tmp_path / "plan.safetensors")
    assert next(iter(again.dense.values())).tolist() == next(iter(plan.dense.values())).tolist()
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    with (tmp_path / "plan.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"plan\.safetensors' changed since it was opened"):
        anysize.apply(again)
    assert not list(tmp_path.glob(".*"))


def test_matrices_that_cannot_be_read_are_named(llama: Path, saved: Path, tmp_path: Path) -> None:
    plan = anysize.plan(llama, calibration=saved, **HALF)
    plan.save(tmp_path / "plan.json")
    from safetensors.torch import save_file

    save_file({"ids": torch.ones(3, dtype=torch.int64)}, tmp_path / "plan.safetensors")
    with pytest.raises(CheckpointError, match="holds I64, wanted F64, F32, F16"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_holds_no_matrix_that_nothing_uses(llama: Path, scores: Scores) -> None:
    plan = anysize.plan(llama, calibration=scores, **HALF)
    assert set(plan.dense) == {name for r in plan.recipes for name in (r.reader, r.writer, r.value)} - {""}


def test_scores_on_disk_are_the_scores(scores: Scores, saved: Path) -> None:
    low = Scores.load(saved, low_memory=True)
    assert low.sha256 == Scores.load(saved).sha256 == scores.sha256
    site = "model.layers.0.mlp.down_proj:in"
    assert low.of(site, "second").equal(Scores.load(saved).of(site, "second"))
    assert low.block("influence").dtype == torch.float64
    with pytest.raises(CheckpointError, match="hold no 'none' of"):
        low.of(site, "none")
    with saved.open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match=r"scores\.safetensors' changed since it was opened: load it again"):
        low.of(site, "second")


def test_large_scores_stay_on_disk_by_themselves(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(isinstance(kinds, dict) for kinds in Scores.load(saved).sites.values())
    monkeypatch.setattr("anysize.calibration.scores.fits_in_memory", lambda _: False)
    assert not any(isinstance(kinds, dict) for kinds in Scores.load(saved).sites.values())


def test_large_models_keep_what_is_fitted_on_disk_by_themselves(
    llama: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = anysize.plan(llama, calibration=scores, **HALF)
    monkeypatch.setattr("anysize.planner.fits_in_memory", lambda _: False)
    found = anysize.plan(llama, calibration=scores, **HALF)
    assert equal(plan, found)
    assert found.dense.resident_bytes < found.dense.num_bytes


def test_where_not_even_a_layer_fits_the_plan_says_so(
    llama: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anysize.cutting.free_bytes", lambda: 1000)
    why = "a layer of each model and the activations do not fit into half of the free memory"
    assert f"readers are least-squares, not sequential: {why}" in anysize.plan(llama, calibration=scores, **HALF).notes
    with pytest.raises(SizeError, match=why):
        anysize.plan(llama, calibration=scores, readers="sequential", **HALF)


def test_a_batch_at_work_is_among_what_has_to_fit(llama: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    config = understand(Checkpoint(llama).config)
    target = understand({**config.raw, "hidden_size": 16, "intermediate_size": 24})

    def needed(**changes: int) -> int:
        return working_bytes(config, target, scores.record.model_copy(update=changes))

    # Gate, up and product of both models in single precision; rows of the widest site twice, in double precision.
    a_token = 4 * 3 * (48 + 24) + 8 * 2 * 48
    assert needed(batch_size=8) - needed(batch_size=0) == 8 * 64 * a_token
    assert needed(batch_size=2, sequence_length=100) - needed(batch_size=0) == 200 * a_token
    # No batch is larger than all that is read.
    assert needed(batch_size=10**9) - needed(batch_size=0) == most_items(config) * a_token
    free = needed(batch_size=0) + needed(batch_size=256)
    monkeypatch.setattr("anysize.cutting.free_bytes", lambda: free)
    monkeypatch.setattr("anysize.sequential.refit", lambda _plan, _tensors, fit, _progress: fit.made)
    for batch_size, readers in ((8, "sequential"), (512, "least-squares")):
        record = scores.record.model_copy(update={"batch_size": batch_size})
        sizes = {"hidden_size": 16, "intermediate_size": 24}
        assert anysize.plan(llama, calibration=replace(scores, record=record), **sizes).options.readers == readers


def test_scratch_keeps_what_it_was_for_whoever_holds_it() -> None:
    scratch = ScratchArrays()
    scratch["a"] = np.arange(6, dtype=np.float32).reshape(2, 3)
    before = DenseMaps(scratch)
    scratch["a"] = np.zeros((2, 2), np.float32)
    scratch["b"] = np.ones(1, np.float32)
    assert before["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert (list(before), sorted(scratch)) == (["a"], ["a", "b"])
    assert before == DenseMaps({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    del scratch["a"]
    assert list(DenseMaps(scratch)) == ["b"]
    number = scratch._file.number
    del scratch
    assert before["a"].shape == (2, 3)
    del before
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_the_command_takes_it(cli: Callable[..., Any], llama: Path, saved: Path, tmp_path: Path) -> None:
    shape = ("--hidden-size", 16, "--calibration", saved)
    runs = [
        cli("resize", llama, tmp_path / name, *shape, *more) for name, more in (("a", ()), ("b", ("--low-memory",)))
    ]
    assert [run.code for run in runs] == [0, 0]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert one == two
    refused = cli("plan", llama, "--hidden-size", 16, "--low-memory")
    assert refused.code == 2
    assert "low_memory: without calibration" in refused.err
