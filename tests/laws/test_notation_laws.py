"""Arrows: print and parse are inverse, and what is malformed is refused with the place named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.errors import ArchitectureError
from anysize.notation import Arrow, Block, Dim, Factor, parse

NAMES = st.sampled_from(["hidden", "ffn", "kv", "group", "head", "vocab", "3"])
FACTORS = st.one_of(
    st.builds(Factor, NAMES), st.builds(Factor, st.sampled_from(["hidden", "head"]), st.sampled_from(["norm", "key"]))
)
BLOCKS = st.builds(Block, st.lists(FACTORS, min_size=1, max_size=3).map(tuple))
DIMS = st.builds(Dim, st.lists(BLOCKS, min_size=1, max_size=3).map(tuple))
SIDES = st.lists(DIMS, min_size=1, max_size=3).map(tuple)
ARROWS = st.builds(Arrow, st.one_of(st.just(()), SIDES), SIDES, st.booleans())


@given(ARROWS)
def test_parsing_what_is_printed_gives_the_arrow_back(arrow: Arrow) -> None:
    assert parse(str(arrow)) == arrow


def test_dims_stand_in_storage_order() -> None:
    linear, embedding = parse("hidden -> (kv head)"), parse("vocab -> hidden, stored in x out")
    assert [str(dim) for dim in linear.dims] == ["(kv head)", "hidden"]
    assert [str(dim) for dim in embedding.dims] == ["vocab", "hidden"]
    assert [str(dim) for dim in parse("3 4 -> hidden").dims] == ["hidden", "3", "4"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("hidden", "there is no '->'"),
        ("hidden ->", "nothing is written: the right side is empty"),
        ("hidden -> (kv head", "wanted 'an axis', got 'the end'"),
        ("hidden -> )", "wanted an axis, got ')'"),
        ("hidden -> norm(+)", "wanted an axis, got '+'"),
        ("norm( -> hidden", "wanted 'an axis', got 'the end'"),
        ("hidden -> mean(ffn)", "unknown role 'mean'"),
        ("hidden -> ffn +", "wanted 'an axis', got 'the end'"),
        ("hidden -> f*n", "unexpected '*'"),
        ("hidden -> ffn, transposed", "after the comma only 'stored in x out' is known, got 'transposed'"),
    ],
)
def test_a_malformed_arrow_is_refused(text: str, why: str) -> None:
    with pytest.raises(ArchitectureError) as refusal:
        parse(text)
    assert str(refusal.value) == f"cannot parse the arrow '{text}': {why}"
