"""Plans are pure data: they save and replay, and account for every tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from anysize.errors import CheckpointError, ProofError
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.presets import PRESETS
from anysize.proof.coverage import account
from anysize.recipe import Options, Plan

SIZES = {"hidden_size": 48, "intermediate_size": 53, "num_key_value_heads": 3, "num_hidden_layers": 3, "vocab_size": 67}


@pytest.fixture(scope="module")
def plan(llama: Path) -> Plan:
    return make_plan(Checkpoint(llama), SIZES, Options(seed=4, preset="hypercloning-noisy"))


@pytest.mark.parametrize("preset", PRESETS)
def test_json_keeps_the_plan_and_its_weights(llama: Path, preset: str) -> None:
    source = Checkpoint(llama)
    plan = make_plan(source, SIZES, Options(preset=preset))
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    first, second = target_tensors(plan, source), target_tensors(again, source)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_same_request_gives_the_same_plan(llama: Path, plan: Plan) -> None:
    options = Options(seed=4, preset="hypercloning-noisy")
    assert make_plan(Checkpoint(llama), dict(reversed(SIZES.items())), options).to_json() == plan.to_json()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"recipes": [{}]}, "recipes.0.name: Field required"),
        ({"axes": {"hidden": {"source_size": 2, "runs": [[0, 5]]}}}, "does not lie in a source of 2"),
    ],
)
def test_json_that_is_no_plan_is_refused_field_by_field(plan: Plan, change: dict[str, Any], why: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        Plan.from_json(json.dumps({**json.loads(plan.to_json()), **change}), origin="p.json")
    assert str(refusal.value).startswith("'p.json' is not a plan: ")
    assert why in str(refusal.value)


def with_recipes(plan: Plan, recipes: list[Any]) -> Plan:
    return plan.model_copy(update={"recipes": tuple(recipes)})


def test_a_plan_accounts_for_every_tensor_once(llama: Path, plan: Plan) -> None:
    source, recipes = Checkpoint(llama), list(plan.recipes)
    account(plan, source)
    renamed = recipes[0].model_copy(update={"name": "model.nothing"})
    reshaped = recipes[0].model_copy(update={"shape": (1, 1)})
    for wrong, why in [
        (recipes[1:], f"{recipes[0].name} is not made"),
        ([recipes[0], *recipes], f"{recipes[0].name} is made 2 times"),
        ([renamed, *recipes[1:]], "model.nothing is made but the target has no such tensor"),
        ([reshaped, *recipes[1:]], f"{recipes[0].name} is made as [1, 1]"),
    ]:
        with pytest.raises(ProofError) as failure:
            account(with_recipes(plan, wrong), source)
        assert why in str(failure.value)


def test_a_source_tensor_that_nothing_uses_is_told(llama: Path, plan: Plan) -> None:
    source = Checkpoint(llama)
    more = NamedTensors(source.config, {**{n: source.read(n) for n in source.tensors}, "odd": torch.ones(2)})
    with pytest.raises(ProofError, match="odd of the source is neither used nor dropped"):
        account(plan, more)


def test_a_source_that_is_not_what_its_config_says_is_refused_all_at_once(llama: Path) -> None:
    source = Checkpoint(llama)
    state = {name: source.read(name) for name in source.tensors}
    del state["model.norm.weight"]
    state["lm_head.weight"] = state["lm_head.weight"][:5]
    state["model.layers.0.mlp.up_proj.weight"] = torch.ones(48, 32, dtype=torch.int32)
    state["odd"] = torch.ones(3)
    with pytest.raises(CheckpointError) as refusal:
        make_plan(NamedTensors(source.config, state), SIZES, Options())
    for why in (
        "missing tensors: model.norm.weight",
        "tensors that a llama with this config does not have: odd",
        "lm_head.weight: got [5, 32], wanted [61, 32]",
        "storage types other than F64, F32, BF16, F16: model.layers.0.mlp.up_proj.weight: I32",
    ):
        assert why in str(refusal.value)


def test_layers_that_are_left_out_are_listed_as_dropped(llama: Path) -> None:
    plan = make_plan(Checkpoint(llama), {"num_hidden_layers": 1}, Options(layers="1"))
    assert {name.split(".")[2] for name in plan.dropped} == {"0"}
    assert not plan.exact


def test_a_headless_checkpoint_is_understood(llama: Path) -> None:
    source = Checkpoint(llama)
    bare = {name.removeprefix("model."): source.read(name) for name in source.tensors}
    plan = make_plan(NamedTensors(source.config, bare), SIZES, Options())
    with_base = make_plan(source, SIZES, Options())
    assert [r.name for r in plan.recipes] == [r.name for r in with_base.recipes]
    first = target_tensors(plan, NamedTensors(source.config, bare))
    second = target_tensors(with_base, source)
    assert all(torch.equal(first[name], second[name]) for name in first)
