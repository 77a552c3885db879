"""Least-squares readers and principal directions: exact where nothing is lost, best where something is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import anysize
from anysize.calibration.scores import Scores
from anysize.config import understand
from anysize.dense import DenseMaps
from anysize.errors import CheckpointError, ProofError
from anysize.executor import target_tensors
from anysize.fit import directions, least_squares
from anysize.io.models import NamedTensors, build_model
from anysize.io.reader import Checkpoint
from anysize.proof.cuts import check_cuts, check_turn
from anysize.proof.miniature import source_tensors
from anysize.proof.precision import DoubleThroughout
from anysize.recipe import Plan
from anysize.shrink import why_stream_is_bound
from tests import tiny

HALF = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
TURNED = [v for v in tiny.VARIANTS if not why_stream_is_bound(understand(tiny.config(v)))]
NOT_TURNED = [v for v in tiny.VARIANTS if v not in TURNED]


def logits_of(variant: tiny.Variant) -> Callable[[NamedTensors], torch.Tensor]:
    inputs = tiny.inputs(variant)

    def logits(tensors: NamedTensors) -> torch.Tensor:
        name = tensors.config["architectures"][0]
        model = build_model(name, tensors.config, source_tensors(tensors), torch.float64)
        with torch.no_grad(), DoubleThroughout():
            return model(**inputs).logits

    return logits


@pytest.mark.parametrize("variant", TURNED, ids=str)
def test_a_full_turn_of_the_stream_keeps_the_logits(variant: tiny.Variant) -> None:
    check = check_turn(tiny.source(variant), logits_of(variant))
    assert check.passed, check
    assert check.measured < 1e-5
    assert check.control is not None
    assert check.control > 0.1


def test_the_families_that_cannot_be_turned_are_those_with_a_reason() -> None:
    assert {v.family for v in NOT_TURNED} == {"gemma2", "gemma3_text", "olmo2", "olmo", "opt"}


@pytest.mark.parametrize("variant", [v for v in tiny.VARIANTS if v.family != "vit"], ids=str)
def test_what_is_cut_is_cut_alike_everywhere(variant: tiny.Variant) -> None:
    source = tiny.source(variant)
    plan = anysize_plan(source, intermediate_size=13)
    checks = check_cuts(plan, source, logits_of(variant))
    assert [check.name for check in checks] == ["cut ffn"]
    for check in checks:
        assert check.passed, check
        assert check.control is not None
        assert check.control > 1e-3


def anysize_plan(source: NamedTensors, **sizes: int) -> Plan:
    from anysize.planner import make_plan
    from anysize.recipe import Options

    return make_plan(source, sizes, Options(select="first", readers="none"))


@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 100))
def test_the_reader_is_the_best_linear_one(size: int, kept: int, seed: int) -> None:
    kept = min(kept, size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, size, generator=generator, dtype=torch.float64)
    z = x[:, :kept] + 0.1 * torch.randn(200, kept, generator=generator, dtype=torch.float64)
    reader = least_squares(x.T @ z, z.T @ z, ridge=0.0)

    def error(s: torch.Tensor) -> float:
        return float((x - z @ s.T).square().mean())

    best = error(reader)
    for _ in range(5):
        assert best <= error(reader + 0.01 * torch.randn(reader.shape, generator=generator, dtype=torch.float64))


@given(st.integers(2, 9), st.integers(2, 9), st.booleans())
def test_directions_are_orthonormal_and_centred_where_asked(size: int, kept: int, centred: bool) -> None:
    kept = min(kept, size)
    x = torch.randn(50, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    x = x - x.mean(1, keepdim=True) if centred else x
    write = directions(x.T @ x, kept, centred=centred)
    z = x @ write.T
    assert write.shape == (kept, size)
    if centred:
        assert z.sum(1).abs().max() < 1e-9
    rank = kept - 1 if centred else kept
    values = torch.linalg.svdvals(write)
    assert values[:rank].allclose(torch.ones(rank, dtype=torch.float64))


def test_growing_and_shrinking_back_gives_the_source_back(llama: Path, tmp_path: Path, text: Path) -> None:
    """A stream that holds two copies of 32 coordinates lies in 32 directions, so nothing is lost."""
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
    grown = anysize.resize(llama, tmp_path / "grown", preset="hypercloning", verify="off", **wide)
    back = anysize.plan(grown, calibration=text, hidden_size=32)
    ids = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(0))

    def logits(config: dict[str, object], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.no_grad():
            return build_model("LlamaForCausalLM", config, tensors, torch.float32)(ids).logits

    source = Checkpoint(grown)
    wanted = logits(dict(source.config), {name: source.read(name) for name in source.tensors})
    got = logits(back.target_config, target_tensors(back, source))
    selected = anysize.plan(grown, select="first", readers="none", hidden_size=32)
    worse = logits(selected.target_config, target_tensors(selected, source))
    assert float((wanted - got).abs().max() / wanted.std()) < 0.05
    assert float((wanted - worse).abs().max() / wanted.std()) > 0.5


def test_every_way_of_reading_gives_other_weights(llama: Path, scores: Scores) -> None:
    readers = ("none", "fan-in", "measured", "least-squares")
    found = {}
    for how in readers:
        plan = anysize.plan(llama, select="activation", readers=how, calibration=scores, **HALF)
        found[how] = target_tensors(plan, Checkpoint(llama))["model.layers.0.mlp.down_proj.weight"]
    names = list(found)
    assert not any(found[a].equal(found[b]) for i, a in enumerate(names) for b in names[:i])


def test_a_plan_with_matrices_replays_to_the_same_bytes(llama: Path, scores: Scores, tmp_path: Path) -> None:
    plan = anysize.plan(llama, calibration=scores, **HALF)
    assert plan.dense
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    one, two = (anysize.apply(p, tmp_path / name) for p, name in ((plan, "one"), (again, "two")))
    assert (Path(str(one)) / "model.safetensors").read_bytes() == (Path(str(two)) / "model.safetensors").read_bytes()


def test_the_matrices_of_another_plan_are_refused(llama: Path, scores: Scores, tmp_path: Path) -> None:
    plan = anysize.plan(llama, calibration=scores, **HALF)
    plan.save(tmp_path / "plan.json")
    name, values = next(iter(plan.dense.items()))
    DenseMaps({**plan.dense, name: values + 1}).save(tmp_path / "plan.safetensors")
    with pytest.raises(CheckpointError, match="does not hold the matrices of this plan"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read the plan's matrices"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_that_lost_its_matrices_is_not_carried_out(llama: Path, scores: Scores, tmp_path: Path) -> None:
    plan = Plan.from_json(anysize.plan(llama, calibration=scores, **HALF).to_json())
    with pytest.raises(ProofError, match="which do not lie beside the plan"):
        anysize.apply(plan, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_rows_that_do_not_come_from_the_matrices_fail_the_proof(llama: Path, scores: Scores) -> None:
    from anysize.proof.algebra import check_rows, rows_of

    plan = anysize.plan(llama, calibration=scores, **HALF)
    source = Checkpoint(llama)
    made = target_tensors(plan, source)
    good = check_rows(plan, rows_of(source), rows_of(NamedTensors(plan.target_config, made)))
    assert good.passed
    made["model.layers.1.mlp.down_proj.weight"] *= 1.01
    assert not check_rows(plan, rows_of(source), rows_of(NamedTensors(plan.target_config, made))).passed


def test_dense_maps_are_equal_when_their_bytes_are() -> None:
    one, two = (DenseMaps({"a": np.ones((2, 3), np.float32) * k}) for k in (1, 2))
    assert one == DenseMaps({"a": np.ones((2, 3), np.float32)})
    assert one != two
    assert not DenseMaps()
    assert DenseMaps().sha256 == ""


@pytest.mark.parametrize("readers", ["least-squares", "measured", "sequential"])
def test_a_layer_that_nothing_comes_through_is_cut_all_the_same(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path, readers: str
) -> None:
    source = new_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        tensors[f"model.layers.1.mlp.{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    found = anysize.calibrate(source, text, sequence_length=64, tokens=4096)
    plan = anysize.plan(source, calibration=found, intermediate_size=24, select="activation", readers=readers)
    made = target_tensors(plan, Checkpoint(source))
    assert all(bool(values.isfinite().all()) for values in made.values())
    # What is kept is read as it was, so that training can make use of it.
    assert made["model.layers.1.mlp.down_proj.weight"].any()


def test_nothing_is_read_from_what_is_always_zero() -> None:
    assert not least_squares(torch.zeros(3, 2).double(), torch.zeros(2, 2).double()).any()
