"""Layer plans: which source layer each target layer copies, and which start silent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.errors import SizeError
from anysize.layers import layer_plan


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
        (2, "identity", "num_hidden_layers 2 is below the source's 3: list the layers to keep (for example 0-1)"),
        (3, "0,1", "layers '0,1' lists 2 layers, but num_hidden_layers is 3"),
        (3, "0-3", "layers '0-3': '0-3' does not lie in 0-2"),
        (3, "2-0", "layers '2-0': '2-0' does not lie in 0-2"),
        (3, "odd", "layers 'odd': 'odd' is neither identity, interpose, stack nor a list such as 0-3,2-5"),
    ],
)
def test_what_is_no_layer_plan_is_refused(target: int, pattern: str, why: str) -> None:
    with pytest.raises(SizeError) as refusal:
        layer_plan(3, target, pattern)
    assert str(refusal.value) == why
