"""What is grown can be trained: fresh capacity moves everywhere, and only equal copies stay equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import tiny

from anysize.config import understand
from anysize.executor import target_tensors
from anysize.io.models import build_model
from anysize.planner import make_plan
from anysize.recipe import Options

VARIANTS = [
    v
    for v in tiny.VARIANTS
    if v.name in ("GQA-tied", "GQA-untied", "tied", "untied", "bias") and not (v.family == "olmo" and v.tied)
]


def trained(
    variant: tiny.Variant, preset: str, sizes: dict[str, int], steps: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Grow, take AdamW steps on random labels, and return the model and its weights before."""
    source = tiny.source(variant)
    plan = make_plan(source, sizes, Options(preset=preset))
    model = build_model(plan.model_class, plan.target_config, target_tensors(plan, source), torch.float64).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    given = tiny.inputs(variant)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        logits = model(**given).logits
        labels = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=generator)
        torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, before


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fresh_capacity_is_trainable_everywhere(variant: tiny.Variant) -> None:
    config = understand(tiny.config(variant))
    separate = "head" in config.architecture.keys
    hidden = 48 if variant.family in ("olmo2", "olmoe") else 36 if separate else 40
    sizes = {"hidden_size": hidden, "intermediate_size": 41}
    if separate:
        sizes |= {"num_attention_heads": 12, "num_key_value_heads": 6}
    model, before = trained(variant, "fresh", sizes, 4)
    stuck = {}
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() != before[name]).double().mean()
        # Rows of tokens and positions that did not occur, and channels behind a dead activation, stay.
        seen = 0.3 if "embed" in name or "wte" in name or "wpe" in name else 0.9
        if moved < seen and not name.endswith(("k_proj.bias", "key.bias")):
            stuck[name] = float(moved)
    assert stuck == {}


@pytest.mark.parametrize("preset", ["hypercloning", "split", "fresh"])
def test_only_symmetric_copies_stay_equal(preset: str) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "llama-GQA-untied")
    model, _ = trained(variant, preset, {"hidden_size": 48, "intermediate_size": 58}, 4)
    rows = model.model.layers[0].mlp.up_proj.weight.detach()
    equal = torch.allclose(rows[:29], rows[29:], atol=1e-9)
    assert equal == (preset == "hypercloning")
