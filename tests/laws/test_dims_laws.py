"""Composed dims: Kronecker products of axis maps, copies counted, new capacity filled by the documented rule."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.axis import NEW, AxisMap, extend, keep, select, tile
from anysize.dims import DimMap, Fill, compose
from anysize.notation import parse


@st.composite
def axes(draw: st.DrawFn) -> dict[str, AxisMap]:
    found = {}
    for name in ("kv", "group", "head", "ffn"):
        size = draw(st.integers(1, 4))
        more = draw(st.lists(st.integers(NEW, size - 1), max_size=3))
        found[name] = select(size, draw(st.permutations([*range(size), *more])))
    return found


def matrix(dim_map: DimMap) -> np.ndarray:
    return AxisMap(source_size=dim_map.source_size, runs=select(dim_map.source_size, dim_map.index).runs).write_matrix()


DIMS = ["(kv group head)", "(kv 3 head)", "(kv group head) + (kv head) + (kv head)", "ffn + ffn", "ffn"]


@given(axes(), st.sampled_from(DIMS))
def test_a_composed_dim_is_the_kronecker_product_of_its_axes(maps: dict[str, AxisMap], text: str) -> None:
    dim = parse(f"-> {text}").writes[0]
    blocks = []
    for block in dim.blocks:
        factors = [np.eye(f.fixed) if f.fixed else maps[f.axis].write_matrix() for f in block.factors]
        blocks.append(reduce(np.kron, factors))
    rows, columns = sum(b.shape[0] for b in blocks), sum(b.shape[1] for b in blocks)
    wanted, row, column = np.zeros((rows, columns)), 0, 0
    for block in blocks:
        wanted[row : row + block.shape[0], column : column + block.shape[1]] = block
        row, column = row + block.shape[0], column + block.shape[1]
    assert np.array_equal(matrix(compose(dim, maps, writes=True)), wanted)


@given(axes(), st.sampled_from(DIMS), st.booleans())
def test_groups_hold_every_copy_once_and_ordinals_count_them(maps: dict[str, AxisMap], text: str, writes: bool) -> None:
    dim_map = compose(parse(f"-> {text}").writes[0], maps, writes=writes)
    seen = []
    for group in dim_map.groups:
        for copy, targets in enumerate(group.targets):
            assert np.array_equal(dim_map.index[targets], group.sources)
            assert (dim_map.ordinal[targets] == copy).all()
            seen += targets.tolist()
    assert sorted(seen) == np.flatnonzero(dim_map.index != NEW).tolist()


@given(axes(), st.booleans())
def test_exactly_the_new_coordinates_are_filled(maps: dict[str, AxisMap], writes: bool) -> None:
    dim_map = compose(parse("-> (kv group head)").writes[0], maps, writes=writes)
    assert np.array_equal(dim_map.fill == Fill.COPY, dim_map.index != NEW)


@pytest.mark.parametrize(
    ("text", "writes", "pad", "fill"),
    [
        ("hidden", True, Fill.ZERO, Fill.ZERO),
        ("hidden", True, Fill.MEAN, Fill.MEAN),
        ("hidden", True, Fill.ONE, Fill.ONE),
        ("norm(hidden)", True, Fill.ONE, Fill.ONE),
        ("norm(hidden)", False, Fill.ZERO, Fill.FRESH),
        ("norm(hidden)", False, Fill.MEAN, Fill.FRESH),
        ("hidden", False, Fill.ZERO, Fill.FRESH),
        ("hidden", False, Fill.MEAN, Fill.ZERO),
        ("ffn", True, Fill.ZERO, Fill.FRESH),
        ("ffn", False, Fill.ZERO, Fill.ZERO),
        ("key(head)", True, Fill.ZERO, Fill.ZERO),
        ("query(head)", True, Fill.ZERO, Fill.FRESH),
        ("vocab", True, Fill.ZERO, Fill.MEAN),
        ("vocab", False, Fill.ZERO, Fill.MEAN),
    ],
)
def test_new_capacity_is_silent_on_one_side_and_alive_on_the_other(
    text: str, writes: bool, pad: Fill, fill: Fill
) -> None:
    maps = {name: extend(3, 5) for name in ("hidden", "ffn", "head", "vocab")}
    assert compose(parse(f"-> {text}").writes[0], maps, writes=writes, pad=pad).fill.tolist() == [0, 0, 0, fill, fill]


def test_inside_a_new_head_the_head_decides() -> None:
    maps = {"kv": extend(1, 2), "head": extend(2, 3)}
    fill = compose(parse("-> (kv key(head))").writes[0], maps, writes=True).fill.tolist()
    assert fill == [Fill.COPY, Fill.COPY, Fill.ZERO, Fill.FRESH, Fill.FRESH, Fill.FRESH]


@given(st.integers(1, 7), st.integers(0, 9), st.sampled_from([0.25, 0.0]))
def test_query_and_key_factors_keep_the_scaled_product(width: int, more: int, power: float) -> None:
    generator = np.random.default_rng(width)
    query, key = generator.standard_normal((2, width))
    maps = {"head": tile(width, width + more)}
    q, k = (
        compose(parse(f"-> {role}(head)").writes[0], maps, writes=True, score_power=power) for role in ("query", "key")
    )
    wide = (query[q.index] * q.factor) @ (key[k.index] * k.factor)
    scale = np.sqrt(width / (width + more)) if power else 1.0
    assert np.isclose(wide * scale, query @ key)


def test_identity_maps_compose_to_the_identity() -> None:
    maps = {name: keep(n) for name, n in (("kv", 2), ("group", 3), ("head", 5))}
    assert compose(parse("-> (kv group query(head))").writes[0], maps, writes=True).is_identity
    assert not compose(parse("-> kv").writes[0], {"kv": tile(2, 4)}, writes=True).is_identity
