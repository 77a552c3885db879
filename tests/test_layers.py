"""Layer plans: which source layer each target layer copies, and which start silent."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.errors import SizeError
from anysize.layers import CUT, EVOLUTIONARY, PATTERNS, SCORED, layer_plan

DROPS = (*CUT, *SCORED)


def sources(source: int, target: int, pattern: str) -> list[int]:
    return [step.source for step in layer_plan(source, target, pattern)]


@given(st.integers(1, 20), st.integers(0, 40))
def test_the_layers_that_are_not_silent_are_the_source_in_order(source: int, more: int) -> None:
    steps = layer_plan(source, source + more, "identity")
    assert len(steps) == source + more
    assert [step.source for step in steps if not step.silent] == list(range(source))


def test_patterns_are_those_of_the_papers() -> None:
    assert sources(3, 6, "interpose") == [0, 0, 1, 1, 2, 2]
    assert sources(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert sources(4, 5, "0,0,2-3,1") == [0, 0, 2, 3, 1]
    assert not any(step.silent for step in layer_plan(3, 6, "interpose"))
    assert [step.silent for step in layer_plan(2, 4, "identity")] == [False, True, False, True]


@pytest.mark.parametrize(
    ("target", "pattern", "why"),
    [
        (
            2,
            "identity",
            "num_hidden_layers 3 -> 2: 'identity' adds layers; to drop some: "
            + ", ".join((*DROPS, EVOLUTIONARY))
            + ", or a list",
        ),
        (
            4,
            "middle",
            "num_hidden_layers 3 -> 4: 'middle' drops layers; to add some: identity, interpose, stack, or a list",
        ),
        (
            2,
            "angular",
            "num_hidden_layers 3 -> 2: 'angular' needs the layers' scores: pass --calibration, or choose middle",
        ),
        (
            2,
            "evolutionary",
            "num_hidden_layers 3 -> 2: 'evolutionary' runs the source on data: pass --calibration, or choose middle",
        ),
        (3, "0,1", "layers '0,1' lists 2 layers, but num_hidden_layers is 3"),
        (3, "0-3", "layers '0-3': '0-3' does not lie in 0-2"),
        (3, "2-0", "layers '2-0': '2-0' does not lie in 0-2"),
        (3, "odd", "layers 'odd': 'odd' is neither " + ", ".join(PATTERNS) + " nor a list such as 0-3,2-5"),
    ],
)
def test_what_is_no_layer_plan_is_refused(target: int, pattern: str, why: str) -> None:
    with pytest.raises(SizeError) as refusal:
        layer_plan(3, target, pattern)
    assert str(refusal.value) == why


def kept(source: int, target: int, pattern: str, scores: dict[str, list[Any]] | None = None) -> list[int]:
    return [step.source for step in layer_plan(source, target, pattern, scores)]


def test_layers_are_dropped_from_the_middle_the_end_or_evenly() -> None:
    assert kept(6, 4, "middle") == [0, 1, 4, 5]
    assert kept(5, 2, "middle") == [0, 4]
    assert kept(6, 4, "first") == [0, 1, 2, 3]
    assert kept(9, 3, "uniform") == [0, 4, 8]
    assert kept(4, 1, "uniform") == [0]


@given(st.integers(1, 30), st.data())
def test_every_cut_keeps_the_asked_number_in_order(source: int, data: st.DataObject) -> None:
    target = data.draw(st.integers(1, source))
    scores = data.draw(st.lists(st.floats(0, 1), min_size=source, max_size=source))
    spans = [[abs(i - j) * scores[0] for j in range(source + 1)] for i in range(source + 1)]
    found = {"influence": scores, "magnitude": scores, "leave-one-out": scores, "angular": spans}
    for pattern in DROPS:
        layers = kept(source, target, pattern, found)
        assert layers == sorted(set(layers))
        assert len(layers) == target
        assert set(layers) <= set(range(source))


def test_low_scores_go_first_and_ties_from_the_front() -> None:
    assert kept(4, 2, "block-influence", {"influence": [0.4, 0.1, 0.1, 0.3]}) == [0, 3]
    assert kept(4, 3, "relative-magnitude", {"magnitude": [0.2, 0.1, 0.1, 0.3]}) == [0, 2, 3]
    distances = [[0, 5, 9, 9], [5, 0, 2, 9], [9, 2, 0, 1], [9, 9, 1, 0]]
    assert kept(3, 2, "angular", {"angular": distances}) == [0, 1]
    assert kept(3, 1, "angular", {"angular": [[0, 5, 3, 9], [5, 0, 2, 4], [3, 2, 0, 1], [9, 4, 1, 0]]}) == [2]
