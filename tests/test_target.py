"""Sizes: what is asked, what follows, what is chosen, on configs of real shapes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from anysize.config import understand
from anysize.errors import SizeError
from anysize.planner import legality
from anysize.recipe import Options
from anysize.target import for_budget, like, padded_vocab, public_sizes, resolve, resolve_or_suggest, scaled, untied
from anysize.tensors import num_parameters

SMOL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12, "n_head": 12,
    "n_positions": 1024, "n_ctx": 1024, "vocab_size": 50257, "activation_function": "gelu_new",
}  # fmt: skip


def heads(raw: dict[str, Any], **asked: int) -> tuple[int, int, int]:
    sizes = resolve(understand(raw), asked).sizes
    return sizes["kv"], sizes["group"], sizes["head"]


def test_parameters_are_counted_as_published() -> None:
    assert num_parameters(understand(SMOL)) == 134_515_008
    assert num_parameters(understand(GPT2)) == 124_439_808


def test_what_is_not_given_stays() -> None:
    target = resolve(understand(SMOL), {"intermediate_size": 2048})
    assert public_sizes(target.config) == public_sizes(understand(SMOL)) | {"intermediate_size": 2048}


def test_whole_groups_follow_their_kv_heads_and_query_heads_share_the_kv_heads() -> None:
    assert heads(SMOL, num_key_value_heads=6) == (6, 3, 64)
    assert heads(SMOL, num_attention_heads=18) == (3, 6, 64)
    assert heads(SMOL, num_attention_heads=24, num_key_value_heads=6) == (6, 4, 64)
    multi_query = {**SMOL, "num_key_value_heads": 1}
    assert heads(multi_query, num_attention_heads=18) == (1, 18, 64)
    multi_head = {**SMOL, "num_key_value_heads": 9}
    assert heads(multi_head, num_attention_heads=18) == (18, 1, 64)


def test_heads_follow_hidden_where_the_head_width_is_no_key() -> None:
    assert heads(GPT2, hidden_size=1024) == (16, 1, 64)
    assert heads(GPT2, hidden_size=1536, num_attention_heads=12) == (12, 1, 128)
    assert heads(GPT2, head_dim=128, num_attention_heads=12) == (12, 1, 128)
    target = resolve(understand(GPT2), {"hidden_size": 1024})
    # n_inner was four times the width without being written down; it must not grow by itself.
    assert target.config.raw["n_inner"] == 3072


OLMO2 = {
    "model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100352,
}  # fmt: skip
POST_NORM = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 16384, "ffn_dim": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": 50272, "word_embed_proj_dim": 512,
    "do_layer_norm_before": False,
}  # fmt: skip

ILLEGAL = [
    (GPT2, {"hidden_size": 1000}, "nearest legal hidden_size: 960 or 1024"),
    (GPT2, {"num_key_value_heads": 4}, "every query head of a gpt2 has its own"),
    (SMOL, {"num_attention_heads": 20}, "nearest legal num_attention_heads: 18 or 24"),
    (SMOL, {"num_attention_heads": 20, "hidden_size": 1440}, "nearest legal num_attention_heads: 18 or 24"),
    (SMOL, {"head_dim": 128}, "keep head_dim=64"),
    (SMOL, {"hidden_sise": 640}, "unknown size 'hidden_sise' (did you mean 'hidden_size'?)"),
    (SMOL, {"num_key_value_heads": 2, "num_attention_heads": 9}, "cannot be shared out evenly over 2 kv heads"),
    (
        SMOL,
        {"hidden_size": 2**31},
        "hidden_size=2147483648 is not a size: wanted a whole number of at least 1, below 2^24",
    ),
    (SMOL, {"hidden_size": 2**80}, "is not a size"),
    (SMOL, {"num_hidden_layers": 100_000}, "num_hidden_layers=100000: wanted at most 10,000"),
    (SMOL, {"hidden_size": 640.0}, "hidden_size=640.0 is not a size"),
    (SMOL, {"hidden_size": "640"}, "hidden_size='640' is not a size"),
    (SMOL, {"hidden_size": True}, "hidden_size=True is not a size"),
    (SMOL, {"hidden_size": None}, "hidden_size=None is not a size"),
    (GPT2, {"hidden_size": 2**24 - 1}, "no separate head width"),
    (OLMO2, {"hidden_size": 3000}, "nearest legal hidden_size: 2048 or 4096"),
    (POST_NORM, {"hidden_size": 24576}, "nearest legal hidden_size: 16384 or 32768"),
]


@pytest.mark.parametrize(("raw", "asked", "why"), ILLEGAL, ids=lambda value: str(value)[:40])
def test_illegal_sizes_are_refused_with_the_reason_and_legal_neighbours(
    raw: dict[str, Any], asked: dict[str, int], why: str
) -> None:
    config = understand(raw)
    check = legality(config, Options())
    with pytest.raises(SizeError) as refusal:
        resolve_or_suggest(config, asked, check)
    assert why in str(refusal.value)
    for public, below, above in re.findall(r"nearest legal (\w+): (\d+) or (\d+)", str(refusal.value)):
        for size in (below, above):
            check(resolve(config, {**asked, public: int(size)}))


@pytest.mark.parametrize("scale", [True, "2", None, float("nan"), float("inf"), 0, -1])
def test_what_is_no_scale_is_refused(scale: Any) -> None:
    with pytest.raises(SizeError, match=r"scale .*: wanted a number above 0"):
        scaled(understand(SMOL), scale)


@pytest.mark.parametrize("budget", [True, "350M", None, float("nan"), float("inf"), 10])
def test_what_is_no_budget_is_refused(budget: Any) -> None:
    config = understand(SMOL)
    with pytest.raises(SizeError, match="num_params"):
        for_budget(config, budget, legality(config, Options()))


@pytest.mark.parametrize("raw", [SMOL, GPT2], ids=["smol", "gpt2"])
@pytest.mark.parametrize("scale", [0.34, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0])
def test_a_scale_gives_a_legal_width_in_step(raw: dict[str, Any], scale: float) -> None:
    config = understand(raw)
    sizes, before = resolve(config, scaled(config, scale)).sizes, config.sizes
    for axis in ("hidden", "ffn", "kv"):
        assert sizes[axis] / before[axis] == pytest.approx(scale, abs=0.2)
    assert sizes["layer"] == before["layer"]
    assert sizes["head"] == before["head"]


@pytest.mark.parametrize("budget", [20_000_000, 70_000_000, 200_000_000, 350_000_000, 1_000_000_000])
def test_a_budget_is_met_within_a_twentieth(budget: int) -> None:
    config = understand(SMOL)
    target = resolve(config, for_budget(config, budget, legality(config, Options())))
    assert num_parameters(target.config) == pytest.approx(budget, rel=0.05)


@pytest.mark.parametrize(
    "fixed",
    [{"num_hidden_layers": 15}, {"intermediate_size": 768}, {"vocab_size": 60_000}, {"num_hidden_layers": 40}, {}],
    ids=str,
)
@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("budget", [70_000_000, 350_000_000])
def test_a_budget_counts_what_is_given_as_well(fixed: dict[str, int], untie: bool, budget: int) -> None:
    config = understand(SMOL)
    request = for_budget(config, budget, legality(config, Options()), fixed, untie=untie)
    assert fixed.items() <= request.items()
    target = resolve(config, request)
    made = (untied(config, target) if untie else target).config
    assert num_parameters(made) == pytest.approx(budget, rel=0.06)


def test_a_given_size_that_no_width_goes_with_is_told() -> None:
    config = understand(SMOL)
    with pytest.raises(SizeError, match="num_experts: a llama has no expert axis"):
        for_budget(config, 70_000_000, legality(config, Options()), {"num_experts": 7})


def test_another_model_gives_its_sizes() -> None:
    bigger = understand({**SMOL, "hidden_size": 960, "num_attention_heads": 15, "num_key_value_heads": 5})
    assert public_sizes(resolve(understand(SMOL), like(understand(SMOL), bigger)).config) == public_sizes(bigger)


def test_the_vocabulary_is_padded_up() -> None:
    assert padded_vocab(understand(GPT2), None, 64) == 50304
    assert padded_vocab(understand(GPT2), 50304, 64) == 50304
    assert padded_vocab(understand(GPT2), 50305, 64) == 50368


def test_the_projection_of_opt_follows_hidden_where_it_was_equal() -> None:
    raw = {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768, "ffn_dim": 3072,
        "num_hidden_layers": 12, "num_attention_heads": 12, "word_embed_proj_dim": 768, "vocab_size": 50272,
    }  # fmt: skip
    assert resolve(understand(raw), {"hidden_size": 1536}).config.raw["word_embed_proj_dim"] == 1536
    projected = {**raw, "word_embed_proj_dim": 512}
    assert resolve(understand(projected), {"hidden_size": 1536}).config.raw["word_embed_proj_dim"] == 512


@pytest.mark.parametrize(("num_params", "heads"), [(70_000_000, 6), (300_000_000, 15)])
def test_budgets_of_wide_models_give_widths_that_matrix_units_like(num_params: int, heads: int) -> None:
    raw = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
           "tie_word_embeddings": True}  # fmt: skip
    found = for_budget(understand(raw), num_params, lambda _: None)
    assert (found["hidden_size"] % 8, found["num_attention_heads"]) == (0, heads)
    here = num_parameters(understand(raw))
    for share in (0.88, 0.9, 1.1):
        sizes = for_budget(understand(raw), int(share * here), lambda _: None)
        # Nothing grows where the model shrinks, nor the other way.
        assert all((sizes[name] <= raw[name]) if share < 1 else (sizes[name] >= raw[name]) for name in sizes)
