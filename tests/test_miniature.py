"""Every plan has a miniature: small sizes of the same kinds of ratios, legal for the family."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from anysize.config import SourceConfig, understand
from anysize.errors import SizeError
from anysize.proof.miniature import smallest_sizes
from anysize.target import resolve
from tests import tiny
from tests.test_target import GPT2, SMOL


def kind(source: int, target: int) -> tuple[int, bool]:
    return target // source, target % source == 0


def check(config: SourceConfig, target: SourceConfig) -> None:
    found = smallest_sizes(config, target.sizes)
    for axis, size in found.source.items():
        assert kind(size, found.target[axis]) == kind(config.sizes[axis], target.sizes[axis])
    assert found.source["hidden"] <= 200 or found.source["hidden"] == found.source["kv"] * found.source["head"]


@settings(max_examples=60)
@given(st.integers(0, 1300), st.integers(0, 9), st.integers(0, 3), st.integers(0, 3000))
def test_any_legal_growth_of_a_grouped_model_has_a_miniature(hidden: int, kv: int, group: int, ffn: int) -> None:
    heads = (3 + kv) * (3 + group)
    wide = -(-(576 + hidden) // heads) * heads
    asked = {"hidden_size": wide, "num_attention_heads": heads, "num_key_value_heads": 3 + kv}
    config = understand(SMOL)
    check(config, resolve(config, {**asked, "intermediate_size": 1536 + ffn}).config)


@pytest.mark.parametrize("width", range(768, 2400, 64))
def test_any_width_of_gpt2_has_a_miniature(width: int) -> None:
    config = understand(GPT2)
    check(config, resolve(config, {"hidden_size": width}).config)


@settings(max_examples=40)
@given(st.sampled_from(tiny.VARIANTS), st.integers(24, 80), st.integers(29, 90))
def test_any_legal_growth_of_any_family_has_a_miniature(variant: tiny.Variant, hidden: int, ffn: int) -> None:
    config = understand(tiny.config(variant))
    try:
        target = resolve(config, {"hidden_size": hidden, "intermediate_size": ffn}).config
    except SizeError:
        assume(False)
        return
    check(config, target)
