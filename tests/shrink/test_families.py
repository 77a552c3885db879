"""Every family is cut by every preset, loads as a stock model, and proves itself on a miniature."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from anysize.calibration.scores import Scores, model_sha256
from anysize.config import understand
from anysize.executor import target_tensors
from anysize.planner import make_plan
from anysize.proof.cuts import miniature_scores
from anysize.proof.miniature import prove_on_miniature
from anysize.recipe import Options
from anysize.shrink import why_stream_is_bound
from tests import tiny

# Where heads make up the width, 16 is a whole number of them, and of kv groups.
CUT = {"hidden_size": 16, "intermediate_size": 13, "num_hidden_layers": 1}
WAYS: dict[str, dict[str, str]] = {
    "weight-selection": {"preset": "weight-selection"},
    "subcloning": {"preset": "subcloning"},
    "minitron": {"preset": "minitron", "layers": "first"},
    "measured": {"preset": "subcloning", "readers": "measured"},
    "least-squares": {"preset": "subcloning", "readers": "least-squares"},
    "subspace": {"preset": "subspace", "readers": "least-squares", "layers": "first"},
}


def scores_for(variant: tiny.Variant) -> Scores:
    source = tiny.source(variant)
    found = miniature_scores(source, understand(source.config))
    return replace(found, record=found.record.model_copy(update={"model_sha256": model_sha256(source)}))


def request(variant: tiny.Variant) -> dict[str, int]:
    """A width that the variant's heads make up."""
    sizes = understand(tiny.config(variant)).sizes
    cut = {**CUT, "num_experts": 3} if "expert" in sizes else CUT
    if "head" in understand(tiny.config(variant)).architecture.keys:
        return {**cut, "hidden_size": 12}
    unit = sizes["head"] * (sizes["group"] if sizes["kv"] > 1 else 1)
    return {**cut, "hidden_size": 16 // unit * unit}


@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_every_preset_cuts_every_family(variant: tiny.Variant) -> None:
    source, scores = tiny.source(variant), scores_for(variant)
    found: dict[str, Any] = {}
    for name, options in WAYS.items():
        calibration = None if name == "weight-selection" else (lambda: scores)
        plan = make_plan(source, request(variant), Options.model_validate(options), calibration)
        assert not plan.exact
        logits = tiny.logits(plan.target_config, target_tensors(plan, source), tiny.inputs(variant))
        assert torch.isfinite(logits).all()
        found[name] = logits
    names = list(found)
    assert not any(found[a].equal(found[b]) for i, a in enumerate(names) for b in names[:i])


@pytest.mark.parametrize("variant", tiny.VARIANTS[::3], ids=str)
def test_a_cut_plan_is_proved_on_a_miniature(variant: tiny.Variant) -> None:
    source, scores = tiny.source(variant), scores_for(variant)
    plan = make_plan(source, request(variant), Options.model_validate(WAYS["subspace"]), lambda: scores)
    proof = prove_on_miniature(plan)
    assert proof.passed, proof.failures
    names = [check.name for check in proof.checks]
    assert "cut ffn" in names
    assert ("cut expert" in names) == ("permute expert" in names) == ("num_experts" in request(variant))
    assert ("turn hidden" in names) == (not why_stream_is_bound(understand(source.config)))
    assert all(check.control is not None for check in proof.checks)
    notes = [note for note in plan.notes if "not by directions" in note]
    assert bool(notes) == ("turn hidden" not in names)


@pytest.mark.parametrize(
    ("family", "asked", "grown"),
    [
        ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1}, "group 2 -> 6"),
        ("phi3", {"num_attention_heads": 6, "num_key_value_heads": 1}, "group 2 -> 6"),
        ("olmo2", {"num_attention_heads": 6, "num_key_value_heads": 1}, "group 2 -> 6"),
        ("gpt2", {"hidden_size": 20, "num_attention_heads": 2}, "head"),
        ("vit", {"hidden_size": 20, "num_attention_heads": 2}, "head"),
    ],
)
def test_where_heads_make_up_the_width_fewer_of_them_may_be_larger(
    family: str, asked: dict[str, int], grown: str
) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == family and not v.tied and "MHA" not in v.name)
    config = understand(tiny.config(variant))
    if "kv" in config.architecture.keys:
        assert (config.sizes["kv"], config.sizes["group"]) == (3, 2)
    scores = scores_for(variant)
    asked = {"intermediate_size": 13, **asked}
    options = Options.model_validate({"preset": "minitron"})
    proof = prove_on_miniature(make_plan(tiny.source(variant), asked, options, lambda: scores))
    assert proof.passed, proof.failures
    assert grown in proof.checks[0].what
