"""Colours and dashes of arms: the same arm looks alike in every picture, on paper, on light and on dark."""

from __future__ import annotations

from dataclasses import dataclass

from anysize.report.schema import Results

# The first is grey, for what the others are measured against. The rest were searched for: a hue each, all pairs as far
# apart as can be for every kind of colour vision, each at 3 to 1 or more from its ground. Tests hold both.
LIGHT = ("#868c97", "#0b94ec", "#d6705c", "#1b4d42", "#951d8b", "#b28a07", "#562cdd", "#70411c")
DARK = ("#cad2d7", "#146df9", "#cf4a13", "#4ee585", "#b84f9f", "#f5c50c", "#ba89f2", "#916f57")
LIGHT_GROUND, DARK_GROUND = "#ffffff", "#121518"
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Look:
    """How one arm is drawn: the place of its colour in `LIGHT` and `DARK`, and its dash."""

    colour: int
    dash: str


def looks(results: Results) -> dict[str, Look]:
    """Return how every arm is drawn: grey is the first goal, the others follow in their order; then dashes change."""
    first = results.goals[:1]
    names = [*first, *(arm.name for arm in results.arms if arm.name not in first)]
    place = len(LIGHT)
    return {name: Look(i % place, DASHES[i // place % len(DASHES)]) for i, name in enumerate(names)}
