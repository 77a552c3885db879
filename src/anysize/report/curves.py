"""What is drawn of the runs: a curve for every arm at its best rate, and what every rate that was tried came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import median

from anysize.report.schema import Results, Run


@dataclass(frozen=True)
class Curve:
    """The held-out metric of one arm at its best rate: median, least and most over the seeds that finished.

    `seconds` begin with what came before training: calibration and conversion.
    """

    arm: str
    learning_rate: float
    num_seeds: int
    steps: tuple[int, ...]
    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    median: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """One arm at one rate. value: the median of the last validation metric over its runs of `status`, if finite.

    `status` is the best that any run came to, of shorter trials the longest; there are `num_runs` such, of so many
    `steps`, and `num_diverged` others that diverged. Where all did, `steps` is the last that was measured.
    """

    arm: str
    learning_rate: float
    status: str
    value: float | None
    steps: int
    num_runs: int
    num_diverged: int
    best: bool


def _finite(values: Sequence[float]) -> bool:
    return all(isfinite(value) for value in values)


def curve(results: Results, name: str) -> Curve | None:
    """Return the curve of an arm at the rate of its row; None where nothing finished there."""
    row = next((row for row in results.rows if row.arm == name), None)
    if row is None:
        return None
    runs = [
        run
        for run in results.runs
        if run.arm == name and run.learning_rate == row.learning_rate and run.status == "finished" and run.at
    ]
    values = [dict(zip(run.at, run.test, strict=True)) for run in runs]
    shared = sorted({step for one in values for step in one if all(step in other for other in values)})
    points = {step: [one[step] for one in values] for step in shared}
    points = {step: found for step, found in points.items() if _finite(found)}
    if not points:
        return None
    arm, steps = results.arm(name), tuple(points)
    first = median(run.first_s for run in runs)
    own = median(run.own_s / max(1, run.steps) for run in runs)
    taught = median(run.teacher_s / max(1.0, arm.taught(run.steps)) for run in runs)
    return Curve(
        arm=name,
        learning_rate=row.learning_rate,
        num_seeds=len(runs),
        steps=steps,
        tokens=tuple(step * results.tokens_a_step for step in steps),
        seconds=tuple(
            arm.calibration_s + arm.conversion_s + first * (step > 0) + step * own + arm.taught(step) * taught
            for step in steps
        ),
        median=tuple(median(found) for found in points.values()),
        low=tuple(min(found) for found in points.values()),
        high=tuple(max(found) for found in points.values()),
    )


def curves(results: Results) -> list[Curve]:
    """Return the curves of all arms that have one, in the order of the arms."""
    return [found for arm in results.arms if (found := curve(results, arm.name))]


def missing(results: Results) -> list[str]:
    """Return the names of the arms without a row: nothing of them has finished."""
    there = {row.arm for row in results.rows}
    return [arm.name for arm in results.arms if arm.name not in there]


def _trial(runs: Sequence[Run], *, best: bool) -> Trial:
    status = next(status for status in ("finished", "trial", "diverged") if any(r.status == status for r in runs))
    counted = [run for run in runs if run.status == status]
    longest = max(run.steps for run in counted)
    counted = [run for run in counted if run.steps == longest]
    last = [run.validation[-1] for run in counted if run.validation and isfinite(run.validation[-1])]
    return Trial(
        arm=runs[0].arm,
        learning_rate=runs[0].learning_rate,
        status=status,
        value=None if status == "diverged" or not last else median(last),
        steps=max(run.at[-1] if run.at else 0 for run in counted) if status == "diverged" else longest,
        num_runs=len(counted),
        num_diverged=sum(run.status == "diverged" for run in runs) if status != "diverged" else 0,
        best=best,
    )


def trials(results: Results) -> list[Trial]:
    """Return what every rate that was tried came to, by arm and then by rate."""
    found: list[Trial] = []
    for arm in results.arms:
        chosen = next((row.learning_rate for row in results.rows if row.arm == arm.name), None)
        for rate in sorted({run.learning_rate for run in results.runs if run.arm == arm.name}):
            runs = [run for run in results.runs if run.arm == arm.name and run.learning_rate == rate]
            found.append(_trial(runs, best=rate == chosen))
    return found
