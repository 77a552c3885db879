"""Growth keeps the function: every family, variant, preset and axis, on stock transformers models in float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tests import tiny

from anysize.config import understand
from anysize.errors import SizeError
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors
from anysize.planner import make_plan
from anysize.presets import PRESETS
from anysize.proof.distance import logit_error
from anysize.proof.miniature import mistaken
from anysize.recipe import Options, Plan
from anysize.target import public_sizes

TOLERANCE = 1e-5
CONTROL = 1e4 * TOLERANCE
GROWTHS = {
    "integer hidden": {"hidden_size": 48},
    "fractional hidden": {"hidden_size": 36},
    "uneven ffn": {"ffn": 71 / 29},
    "kv groups": {"kv": 2},
    "uneven kv groups": {"kv": 4 / 3},
    "query heads": {"group": 1.5},
    "identity layers": {"num_hidden_layers": 5},
    "all at once": {"hidden_size": 48, "ffn": 53 / 29, "num_hidden_layers": 3},
}


@cache
def source_of(variant: tiny.Variant) -> tuple[NamedTensors, torch.Tensor]:
    source = tiny.source(variant)
    wanted = tiny.logits(source.config, {n: source.read(n) for n in source.tensors}, tiny.inputs(variant))
    return source, wanted


def request(source: NamedTensors, growth: dict[str, Any]) -> dict[str, int]:
    """The public sizes of a growth; heads are counted from the source's own."""
    config = understand(source.config)
    sizes, found = public_sizes(config), dict(growth)
    kv, heads = sizes["num_key_value_heads"], sizes["num_attention_heads"]
    if "ffn" in found:
        found["intermediate_size"] = round(sizes["intermediate_size"] * found.pop("ffn"))
    separate = "head" in config.architecture.keys
    if "kv" in found or "group" in found:
        by_kv, by_group = found.pop("kv", 1), found.pop("group", 1)
        new_kv = round(kv * by_kv)
        new_heads = new_kv * round(heads / kv * by_group)
        found |= {"num_key_value_heads": new_kv, "num_attention_heads": new_heads}
        if not separate:
            # Without a head width of its own, more heads of the same width are a wider stream.
            found["hidden_size"] = new_heads * sizes["head_dim"]
        elif sizes["hidden_size"] % new_heads:
            found["hidden_size"] = new_heads * -(-sizes["hidden_size"] // new_heads)
    elif not separate and "hidden_size" in found:
        unit = sizes["head_dim"] * (heads // kv if kv > 1 else 1)
        found["hidden_size"] = -(-found["hidden_size"] // unit) * unit
    return {name: int(size) for name, size in found.items()}


def grown_error(plan: Plan, source: NamedTensors, variant: tiny.Variant, wanted: torch.Tensor) -> float:
    return logit_error(wanted, tiny.logits(plan.target_config, target_tensors(plan, source), tiny.inputs(variant)))


_NEEDS_HEADS = ("fractional hidden", "uneven kv groups", "query heads")
_ALL_BUT_FFN_AND_DEPTH = {
    "integer hidden",
    "fractional hidden",
    "kv groups",
    "uneven kv groups",
    "query heads",
    "all at once",
}
# Everything that is refused, and why; whatever is not here has to be grown.
REFUSED: dict[str, tuple[set[str], str]] = {
    "olmo-MHA-tied": (_ALL_BUT_FFN_AND_DEPTH, "no final norm gain"),
    "olmo-GQA-tied": (_ALL_BUT_FFN_AND_DEPTH, "no final norm gain"),
    "olmo-MQA-tied": (_ALL_BUT_FFN_AND_DEPTH - {"uneven kv groups"}, "no final norm gain"),
    "olmo2-MHA": ({"fractional hidden", "uneven kv groups"}, "query and key norms span all heads"),
    "olmo2-GQA": (set(_NEEDS_HEADS), "query and key norms span all heads"),
    "olmo2-attention_bias": (set(_NEEDS_HEADS), "query and key norms span all heads"),
    "olmo2-MQA": ({"fractional hidden", "query heads"}, "query and key norms span all heads"),
    "olmoe-MHA": ({"fractional hidden", "uneven kv groups"}, "query and key norms span all heads"),
    "olmoe-GQA": (set(_NEEDS_HEADS), "query and key norms span all heads"),
    "olmoe-attention_bias": (set(_NEEDS_HEADS), "query and key norms span all heads"),
    "olmoe-MQA": ({"fractional hidden", "query heads"}, "query and key norms span all heads"),
    "gpt2": ({"query heads"}, "every query head of a gpt2 has its own"),
    "gpt_neox": ({"query heads"}, "every query head of a gpt_neox has its own"),
    "vit": ({"query heads"}, "every query head of a vit has its own"),
    "opt-350m": (
        {"fractional hidden", "uneven kv groups", "identity layers", "all at once", "query heads"},
        "norm after the residual sum|every query head",
    ),
    "opt": ({"query heads"}, "every query head of a opt has its own"),
}


def refusal(variant: tiny.Variant, growth: str) -> str:
    """Why a growth of a variant is refused; empty where it has to be made."""
    found = next((value for name, value in REFUSED.items() if str(variant).startswith(name)), None)
    return found[1] if found is not None and growth in found[0] else ""


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_fresh_growth_keeps_the_logits_or_is_refused_with_its_reason(variant: tiny.Variant, growth: str) -> None:
    source, wanted = source_of(variant)
    why = refusal(variant, growth)
    if why:
        with pytest.raises(SizeError, match=why):
            make_plan(source, request(source, GROWTHS[growth]), Options())
        return
    plan = make_plan(source, request(source, GROWTHS[growth]), Options())
    assert plan.exact
    assert grown_error(plan, source, variant, wanted) <= TOLERANCE


MAIN = [
    v for v in tiny.VARIANTS if v.name in ("GQA-tied", "GQA-untied", "tied", "untied", "bias", "350m", "MHA-untied")
]


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "fresh"])
@pytest.mark.parametrize("variant", MAIN, ids=str)
def test_every_preset_keeps_the_logits(variant: tiny.Variant, preset: str) -> None:
    source, wanted = source_of(variant)
    for growth in ("all at once", "fractional hidden"):
        options, why = Options(preset=preset, seed=3), refusal(variant, growth)
        if why:
            with pytest.raises(SizeError, match=why):
                make_plan(source, request(source, GROWTHS[growth]), options)
            continue
        plan = make_plan(source, request(source, GROWTHS[growth]), options)
        assert grown_error(plan, source, variant, wanted) <= TOLERANCE


@pytest.mark.parametrize("variant", MAIN, ids=str)
def test_a_mistaken_plan_is_far_from_the_logits(variant: tiny.Variant) -> None:
    source, wanted = source_of(variant)
    plan = make_plan(source, request(source, {"intermediate_size": 53}), Options())
    assert grown_error(mistaken(plan), source, variant, wanted) >= CONTROL


@pytest.mark.parametrize("variant", [v for v in MAIN if v.name != "350m" and v.family != "olmo"], ids=str)
def test_presets_differ_in_weights(variant: tiny.Variant) -> None:
    source, _ = source_of(variant)
    asked = request(source, {"hidden_size": 48, "intermediate_size": 58})
    made = {name: target_tensors(make_plan(source, asked, Options(preset=name)), source) for name in PRESETS}
    for one in PRESETS:
        for other in PRESETS:
            same = all(torch.equal(made[one][name], made[other][name]) for name in made[one])
            assert same == (one == other), (one, other)


@pytest.mark.parametrize("head_dim", [11, 16])
@pytest.mark.parametrize("variant", [v for v in MAIN if v.family in ("gpt2", "opt", "vit")], ids=str)
def test_wider_heads_keep_the_logits_where_positions_are_learned(variant: tiny.Variant, head_dim: int) -> None:
    source, wanted = source_of(variant)
    if variant.name == "350m" and head_dim == 11:
        with pytest.raises(SizeError, match="norm after the residual sum"):
            make_plan(source, {"hidden_size": 33, "head_dim": 11}, Options())
        return
    asked = {"hidden_size": 3 * head_dim, "head_dim": head_dim, "num_attention_heads": 3}
    for preset in PRESETS:
        plan = make_plan(source, asked, Options(preset=preset))
        assert plan.axes["head"].target_size == head_dim
        assert grown_error(plan, source, variant, wanted) <= TOLERANCE


def test_wider_heads_keep_the_logits_where_the_score_scale_is_fixed() -> None:
    variant = next(v for v in tiny.VARIANTS if v.name == "fixed-scale")
    source, wanted = source_of(variant)
    plan = make_plan(source, {"hidden_size": 48, "head_dim": 16, "num_attention_heads": 3}, Options(preset="split"))
    assert grown_error(plan, source, variant, wanted) <= TOLERANCE


@pytest.mark.parametrize("variant", [v for v in MAIN if v.family not in ("gpt2", "opt", "vit")], ids=str)
def test_wider_heads_are_refused_under_rotary_positions(variant: tiny.Variant) -> None:
    source, _ = source_of(variant)
    heads = public_sizes(understand(source.config))["num_attention_heads"]
    with pytest.raises(SizeError, match="rotary positions"):
        make_plan(source, {"hidden_size": 16 * heads, "head_dim": 16, "num_attention_heads": heads}, Options())


@pytest.mark.parametrize("variant", [v for v in MAIN if v.tied], ids=str)
def test_tied_stays_tied_and_untying_is_exact(variant: tiny.Variant) -> None:
    source, wanted = source_of(variant)
    asked = request(source, {"intermediate_size": 53})
    tied, untied = (make_plan(source, asked, Options(untie=flag)) for flag in (False, True))
    head = next(iter(understand(source.config).architecture.tied))
    assert head not in {recipe.name for recipe in tied.recipes}
    assert head in {recipe.name for recipe in untied.recipes}
    assert untied.target_config["tie_word_embeddings"] is False
    assert grown_error(untied, source, variant, wanted) <= TOLERANCE


@pytest.mark.parametrize("layers", ["interpose", "stack", "0,0,1"])
def test_copied_layers_are_never_called_exact(layers: str) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "llama-GQA-untied")
    source, wanted = source_of(variant)
    plan = make_plan(source, {"num_hidden_layers": 3 if "," in layers else 4}, Options(layers=layers))
    assert not plan.exact
    assert "layers" in plan.inexact[0]
    assert grown_error(plan, source, variant, wanted) >= CONTROL


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "qwen3"])
def test_layer_types_follow_the_layer_plan_also_where_the_config_leaves_them_out(family: str) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == family and v.name == "GQA-untied")
    source, _ = source_of(variant)
    types = list(source.config["layer_types"])
    plan = make_plan(source, {"num_hidden_layers": 4}, Options())
    assert plan.target_config["layer_types"] == [types[0], types[0], types[1], types[1]]
    without = NamedTensors(
        {k: v for k, v in source.config.items() if k != "layer_types"}, {n: source.read(n) for n in source.tensors}
    )
    again = make_plan(without, {"num_hidden_layers": 4}, Options())
    assert again.target_config["layer_types"] == plan.target_config["layer_types"]


@pytest.mark.parametrize("variant", [v for v in MAIN if v.family in ("llama", "gpt2", "gemma")], ids=str)
def test_more_vocabulary_keeps_the_old_logits_and_is_not_called_exact(variant: tiny.Variant) -> None:
    source, wanted = source_of(variant)
    plan = make_plan(source, {"vocab_size": 37, "intermediate_size": 53}, Options())
    assert not plan.exact
    assert "vocab_size 31 -> 37" in plan.inexact[0]
    made = target_tensors(plan, source)
    assert grown_error(plan, source, variant, wanted) <= TOLERANCE
    embedding = next(t for n, t in made.items() if t.shape[0] == 37)
    assert torch.allclose(embedding[31:], embedding[:31].mean(0, keepdim=True).expand(6, -1), atol=1e-6)
