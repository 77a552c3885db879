"""The result in one sentence and four figures, rounded so that they never promise more than was measured."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor

from anysize.report.curves import missing
from anysize.report.schema import Reached, Results, Row

_ROUNDING = 1e-9


@dataclass(frozen=True)
class Tile:
    """One figure with what it is and what stands behind it."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Headline:
    """The sentence, what has to be said beside it, and the tiles."""

    sentence: str
    beside: tuple[str, ...]
    tiles: tuple[Tile, ...]


# Below this a share is nothing, and its inverse more than a float may hold.
_NOTHING = 1e-12


def fraction(share: float) -> str:
    """Return a share as `1/9`, `72 %` or `1.4 times`, never better than it is."""
    if share < _NOTHING:
        return "0"
    if share <= 0.5:
        return f"1/{floor(1 / share + _ROUNDING):,}"
    if share <= 1:
        return f"{ceil(share * 100 - _ROUNDING)} %"
    return f"{ceil(share * 10 - _ROUNDING) / 10:,.1f} times"


def _portion(share: float, unit: str) -> str:
    if share <= 0:
        return f"none of its {unit}"
    if share <= 0.5:
        return f"{fraction(share)} of its {unit}"
    return f"{fraction(share)}{' of' if share <= 1 else ''} its {unit}"


def leader(results: Results) -> Row | None:
    """Return the row to speak of: the least steps to the first goal, or the best end where none comes there."""
    goal = results.goals[0] if results.goals else None
    rows = [row for row in results.rows if row.arm != goal]
    there = [(found.steps_share, row.after, row) for row in rows if goal and (found := row.reached.get(goal))]
    if there:
        return min(there, key=lambda one: one[:2])[2]
    return min(rows, key=lambda row: row.after, default=None)


def number(value: float) -> str:
    """Return a value of the metric as a person reads it."""
    return f"{value:.3f}"


def _row(results: Results, name: str) -> Row | None:
    return next((row for row in results.rows if row.arm == name), None)


def _sentence(results: Results, row: Row | None) -> str:
    goal, metric = (results.goals[0] if results.goals else None), results.metric
    if row is None:
        names = ", ".join(row.arm for row in results.rows)
        return f"Only {names} has finished: there is nothing to compare it with." if names else "No run has finished."
    if goal is None or _row(results, goal) is None:
        beside = "" if goal is None else f"; {goal}, which it is to be measured against, has not finished"
        return f"{row.arm} ends at {number(row.after)} {metric.unit}{beside}."
    found = row.reached.get(goal)
    if found is None:
        who = "No arm reaches" if len(results.rows) > 2 else f"{row.arm} does not reach"
        return f"{who} the final {metric.name} of {goal}."
    if found.steps_share <= 0:
        return f"{row.arm} is at the final {metric.name} of {goal} or below it before its first step."
    return f"{row.arm} reaches the final {metric.name} of {goal} in {_portion(found.steps_share, 'steps')}."


def _beside(results: Results, row: Row) -> list[str]:
    metric, said = results.metric, list[str]()
    for i, goal in enumerate(results.goals):
        if goal == row.arm or (other := _row(results, goal)) is None:
            continue
        if found := row.reached.get(goal):
            seconds, flops = _portion(found.seconds_share, "seconds"), _portion(found.flops_share, "FLOPs")
            if i == 0:
                said.append(f"With calibration, conversion and the teacher that is {seconds} and {flops}.")
            else:
                steps = _portion(found.steps_share, "steps")
                said.append(f"To the final {metric.name} of {goal} it takes {steps}, {seconds} and {flops}.")
        elif i > 0:
            said.append(f"It does not reach the final {metric.name} of {goal}, {number(other.after)} {metric.unit}.")
        if i == 0:
            said.append(f"It ends at {number(row.after)} {metric.unit}, {goal} at {number(other.after)}.")
    return said


def _tiles(results: Results, row: Row) -> list[Tile]:
    goal, tiles = (results.goals[0] if results.goals else None), list[Tile]()
    other = _row(results, goal) if goal else None
    if goal and other and goal != row.arm:
        found = row.reached.get(goal)
        title = f"to the final {results.metric.name} of {goal}"
        for label, unit in (("Steps", "steps"), ("Seconds", "seconds"), ("FLOPs", "flops")):
            tiles.append(_tile(found, f"{label} {title}", unit, results.steps_of(row.arm)))
    against = [f"{goal} {number(other.after)}"] if goal and other and goal != row.arm else []
    against += [f"source {number(results.source.test)}"] if results.source else []
    unit = f"{results.metric.unit} after {results.steps_of(row.arm):,} steps" if not against else ", ".join(against)
    tiles.append(Tile(f"Final {results.metric.name} of {row.arm}, {results.metric.unit}", number(row.after), unit))
    return tiles


def _tile(found: Reached | None, label: str, unit: str, steps: int) -> Tile:
    if found is None:
        return Tile(label, "not reached", f"in {steps:,} steps")
    share = {"steps": found.steps_share, "seconds": found.seconds_share, "flops": found.flops_share}[unit]
    amount = {
        "steps": f"{found.steps:,.0f} steps",
        "seconds": f"{found.seconds:,.0f} s, calibration, conversion and teacher included",
        "flops": f"{found.flops:.2g} FLOPs, calibration, conversion and teacher included",
    }[unit]
    return Tile(label, fraction(share), f"share {share:.3f}: {amount}")


def headline(results: Results) -> Headline:
    """Return what the results say about the first goal, honestly where it was not reached."""
    row = leader(results)
    beside = _beside(results, row) if row else []
    if names := missing(results):
        beside.append(f"Without a finished run: {', '.join(names)}.")
    return Headline(_sentence(results, row), tuple(beside), tuple(_tiles(results, row) if row else []))
