"""Plans that cut one axis and grow another: the proof on the real tensors passes them, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.calibration.scores import Scores
from anysize.errors import ProofError, SizeError
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors, build_model
from anysize.io.reader import Checkpoint
from anysize.proof.algebra import check_rows, rows_of
from anysize.recipe import Plan
from tests import tiny

# Deeper and narrower, copies of neurons read by what directions write, and both at once.
MIXED: list[dict[str, Any]] = [
    {"num_hidden_layers": 4, "intermediate_size": 24},
    {"num_hidden_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
    {"num_hidden_layers": 3, "intermediate_size": 24, "layers": "interpose"},
    {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "preset": "split"},
    {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
     "preset": "hypercloning", "num_hidden_layers": 3},
]  # fmt: skip


def passes(plan: Plan, source: Any, made: dict[str, Any]) -> bool:
    return check_rows(plan, rows_of(source), rows_of(NamedTensors(plan.target_config, made))).passed


@pytest.mark.parametrize("asked", MIXED, ids=lambda asked: "-".join(f"{k}={v}" for k, v in asked.items()))
def test_a_mixed_plan_is_proved_and_a_spoilt_one_is_not(llama: Path, scores: Scores, asked: dict[str, Any]) -> None:
    plan = anysize.plan(llama, calibration=scores, **asked)
    source = Checkpoint(llama)
    made = target_tensors(plan, source)
    assert plan.dense
    assert passes(plan, source, made)
    spoilt = {recipe.name for recipe in plan.recipes if recipe.reader or recipe.writer or recipe.silent}
    for name in sorted(spoilt)[:: max(1, len(spoilt) // 6)]:
        assert not passes(plan, source, {**made, name: made[name] * 1.01 + 1e-3}), name


@pytest.mark.parametrize("family", ["gpt_neox", "opt", "vit", "gpt2"])
def test_pads_that_hold_the_mean_are_proved_beside_cut_neurons(family: str) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == family)
    source = tiny.source(variant)
    plan = anysize.plan(tiny.model(variant), hidden_size=32, intermediate_size=13)
    made = target_tensors(plan, source)
    assert passes(plan, source, made)
    means = [recipe.name for recipe in plan.recipes if recipe.pad == "mean" and len(recipe.shape) == 2]
    assert means
    assert not passes(plan, source, {**made, means[-1]: made[means[-1]] * 1.1})


def test_where_only_layers_go_readers_follow_what_comes_out_of_the_gap(
    llama: Path, scores: Scores, tmp_path: Path
) -> None:
    source = Checkpoint(llama)
    plain = anysize.plan(llama, calibration=scores, num_hidden_layers=1, readers="none")
    fitted = anysize.plan(llama, calibration=scores, num_hidden_layers=1)
    assert not plain.dense
    assert fitted.dense
    assert fitted.options.readers == "sequential"
    assert passes(fitted, source, target_tensors(fitted, source))
    ids = torch.randint(3, 61, (4, 32), generator=torch.Generator().manual_seed(0))

    def divergence(plan: Plan) -> float:
        with torch.no_grad():
            got, wanted = (
                build_model("LlamaForCausalLM", config, tensors, torch.float32)(ids).logits.log_softmax(-1)
                for config, tensors in (
                    (plan.target_config, target_tensors(plan, source)),
                    (dict(source.config), {name: source.read(name) for name in source.tensors}),
                )
            )
        return float((wanted.exp() * (wanted - got)).sum(-1).mean())

    assert divergence(fitted) < divergence(plain)
    # Every proof of a whole resize knows of such readers, and of no others.
    for name, plan in (("plain", plain), ("fitted", fitted)):
        assert anysize.apply(plan, tmp_path / name, verify="full") == tmp_path / name
    edited = fitted.model_copy(update={"options": fitted.options.model_copy(update={"readers": "none"})})
    with pytest.raises(ProofError, match="is not what this version makes"):
        anysize.apply(edited, tmp_path / "edited")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"num_hidden_layers": 1, "select": "weight"}, "only layers are dropped, and `layers` says which"),
        ({"num_hidden_layers": 1, "readers": "fan-in"}, "no reader loses an input"),
        ({"intermediate_size": 24, "layers": "middle"}, "num_hidden_layers stays"),
        ({"intermediate_size": 24, "layers": "stack"}, "num_hidden_layers stays"),
    ],
)
def test_options_that_would_do_nothing_are_refused(llama: Path, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(SizeError, match=told):
        anysize.plan(llama, **asked)
