"""Axis maps: S . R = I, composition, runs and JSON."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from anysize.axis import NEW, AxesAt, AxisMap, extend, keep, own_place, runs_of, select, tile

SIZES = st.integers(1, 13)


@st.composite
def maps(draw: st.DrawFn, source: int | None = None) -> AxisMap:
    size = source or draw(SIZES)
    index = draw(st.lists(st.integers(NEW, size - 1), min_size=1, max_size=29))
    return select(size, index)


@st.composite
def invertible(draw: st.DrawFn) -> AxisMap:
    size = draw(SIZES)
    more = draw(st.lists(st.integers(NEW, size - 1), max_size=17))
    return select(size, draw(st.permutations([*range(size), *more])))


@given(invertible())
def test_reading_what_was_written_gives_the_source_back(axis_map: AxisMap) -> None:
    assert axis_map.has_left_inverse
    assert np.allclose(axis_map.read_matrix() @ axis_map.write_matrix(), np.eye(axis_map.source_size))


@given(maps())
def test_a_map_without_all_its_sources_has_no_left_inverse(axis_map: AxisMap) -> None:
    rank = np.linalg.matrix_rank(axis_map.write_matrix())
    assert axis_map.has_left_inverse == (rank == axis_map.source_size)


@given(st.data())
def test_composition_is_the_product_of_the_matrices_and_associates(data: st.DataObject) -> None:
    a = data.draw(maps())
    b = data.draw(maps(a.target_size))
    c = data.draw(maps(b.target_size))
    assert np.array_equal(a.then(b).write_matrix(), b.write_matrix() @ a.write_matrix())
    assert a.then(b).then(c) == a.then(b.then(c))
    assert a.then(keep(a.target_size)) == a == keep(a.source_size).then(a)


def test_maps_of_other_sizes_do_not_compose() -> None:
    with pytest.raises(ValueError, match="5 coordinates meet a map of 7"):
        keep(5).then(keep(7))


@given(SIZES, st.integers(1, 4))
def test_selecting_one_copy_of_a_tiling_is_the_identity(size: int, copies: int) -> None:
    one = select(copies * size, range((copies - 1) * size, copies * size))
    assert tile(size, copies * size).then(one) == keep(size)


@given(SIZES, SIZES)
def test_tiling_wraps_and_extending_adds(size: int, more: int) -> None:
    assert tile(size, size + more).index.tolist() == [i % size for i in range(size + more)]
    assert extend(size, size + more).index.tolist() == [*range(size), *[NEW] * more]
    assert extend(size, size + more).num_new == more
    assert tile(size, 3 * size).is_uniform
    assert tile(size, size + more).is_uniform == (more % size == 0)


@given(st.lists(st.integers(NEW, 12), min_size=1, max_size=40))
def test_runs_keep_the_index(index: list[int]) -> None:
    assert AxisMap(source_size=13, runs=runs_of(index)).index.tolist() == index


@given(maps())
def test_json_keeps_the_map(axis_map: AxisMap) -> None:
    assert AxisMap.model_validate_json(axis_map.model_dump_json()) == axis_map


@pytest.mark.parametrize("run", [(0, 6), (5, 1), (-2, 1), (1, 0), (4, 2)])
def test_a_run_outside_the_source_is_refused(run: tuple[int, int]) -> None:
    with pytest.raises(ValidationError, match="does not lie in a source of 5"):
        AxisMap(source_size=5, runs=(run,))


def test_more_copies_than_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 copies of 5 do not fit into 14"):
        extend(5, 14, copies=3)


def test_an_expert_s_own_map_comes_before_its_layer_s_and_that_before_the_common_one() -> None:
    axes = {"ffn": keep(2), "ffn.1": keep(3), "ffn.1.5": keep(4), "kv": keep(6)}
    sizes = {
        place: AxesAt(axes, *place)["ffn"].target_size for place in ((None, None), (5, None), (1, None), (1, 2), (1, 5))
    }
    assert list(sizes.values()) == [2, 2, 3, 3, 4]
    assert dict(AxesAt(axes, 1, 5)) == {"ffn": keep(4), "kv": keep(6)}
    places = {place: own_place(axes, ("kv", "ffn"), *place) for place in ((5, None), (1, None), (1, 2), (1, 5))}
    assert list(places.values()) == [(None, None), (1, None), (1, None), (1, 5)]
    assert own_place(axes, ("kv",), 1, 5) == (None, None)
