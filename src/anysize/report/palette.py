"""Colours and dashes of arms: the same arm looks alike in every picture, on paper, on light and on dark."""

from __future__ import annotations

from dataclasses import dataclass

from anysize.report.schema import Results

# The first is grey, for what the others are measured against. The rest are told apart with every common kind of
# colour blindness (after Okabe and Ito), and each stands out from its ground by 3 to 1 or more.
LIGHT = ("#667080", "#0072b2", "#c2410c", "#00815e", "#a8457f", "#8a6a00", "#3d3aa8", "#7a4a21")
DARK = ("#9aa5b1", "#4fa8e8", "#f28a4e", "#2fc79b", "#e58cc0", "#e3b92c", "#a3a0ff", "#cfa074")
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
