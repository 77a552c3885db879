"""The tables of a comparison as rows of text: one source for the page, the terminal and the cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from anysize.flops import flops_a_second
from anysize.report.curves import Trial, missing, trials
from anysize.report.headline import number
from anysize.report.schema import Arm, Results, Row, Run

NOT_REACHED = "not reached"


@dataclass(frozen=True)
class Cell:
    """One cell: its text, a smaller second line, and how it stands out ("", "best", "lost", "muted", "partial")."""

    text: str
    below: str = ""
    tone: str = ""


@dataclass(frozen=True)
class Group:
    """A heading over `count` columns, and its short form for a terminal; an empty name is no heading."""

    name: str
    count: int
    short: str = ""


@dataclass(frozen=True)
class Table:
    """A table: rows start with the name of an arm, groups stand over columns from the left."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    groups: tuple[Group, ...] = ()


def share(value: float) -> str:
    """Return a share as a person reads it."""
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"


def seconds(value: float) -> str:
    """Return seconds as a person reads them."""
    return f"{value:.2g} s" if value < 10 else f"{value:,.0f} s"


def flops(value: float) -> str:
    """Return a number of floating-point operations; empty where it is not known."""
    return f"{value:.3g}" if value else ""


def _with_source(value: float | None) -> str:
    return "" if value is None else f"{share(value)} with the source"


def _reached(row: Row, goal: str) -> list[Cell]:
    if goal not in row.reached:
        return [Cell("–", "itself" if row.arm == goal else "", "muted")] * 3
    found = row.reached[goal]
    if found is None:
        return [Cell(NOT_REACHED, tone="lost"), Cell(NOT_REACHED, tone="lost"), Cell(NOT_REACHED, tone="lost")]
    return [
        Cell(share(found.steps_share), f"{found.steps:,.0f} steps"),
        Cell(share(found.flops_share), _with_source(found.flops_share_with_source)),
        Cell(share(found.seconds_share), _with_source(found.seconds_share_with_source) or seconds(found.seconds)),
    ]


def summary(results: Results) -> Table:
    """Return one row for every arm, those that lost and those without a finished run included."""
    columns = ("arm", "rate", "before", "after", "of each seed", "rise")
    groups = [Group("", len(columns))]
    groups += [Group(f"to the final {results.metric.name} of {goal}", 3, f"to {goal}") for goal in results.goals]
    columns += (f"steps, {results.counted}", "FLOPs", "seconds") * len(results.goals)
    rows: list[tuple[Cell, ...]] = []
    least = min((row.after for row in results.rows), default=0.0)
    for row in results.rows:
        diverged = (f"{row.num_diverged} diverged", "partial") if row.num_diverged else ()
        cells = [
            Cell(row.arm),
            Cell(f"{row.learning_rate:g}"),
            Cell(number(row.before)),
            Cell(number(row.after), tone="best" if row.after == least else ""),
            Cell("  ".join(map(number, row.after_of_seeds)), *diverged),
            Cell(number(row.rise) if row.rise > 0 else "0"),
        ]
        for goal in results.goals:
            cells += _reached(row, goal)
        rows.append(tuple(cells))
    for name in missing(results):
        rows.append((Cell(name), Cell("no finished run", tone="lost"), *(Cell("") for _ in columns[2:])))
    return Table(columns, tuple(rows), tuple(groups))


def _trial(trial: Trial | None) -> Cell:
    if trial is None:
        return Cell("–", tone="muted")
    if trial.status == "diverged":
        return Cell("diverged", f"after step {trial.steps:,}", "lost")
    value = "–" if trial.value is None else number(trial.value)
    told = [f"trial of {trial.steps:,} steps"] if trial.status == "trial" else []
    told += [f"{trial.num_runs} seeds"] if trial.num_runs > 1 else []
    told += [f"{trial.num_diverged} diverged"] if trial.num_diverged else []
    return Cell(value, ", ".join(told), "muted" if trial.status == "trial" else "best" if trial.best else "")


def rates(results: Results) -> Table:
    """Return the last validation metric of every arm at every rate; shorter trials and diverged runs are marked."""
    found = {(trial.arm, trial.learning_rate): trial for trial in trials(results)}
    tried = sorted({*results.learning_rates, *(rate for _, rate in found)})
    rows = [
        (Cell(arm.name), *(_trial(found.get((arm.name, rate))) for rate in tried))
        for arm in results.arms
    ]  # fmt: skip
    return Table(
        ("arm", *(f"{rate:g}" for rate in tried)), tuple(rows), (Group("", 1), Group("learning rate", len(tried)))
    )


def _speed(results: Results, runs: Sequence[Run]) -> Cell:
    """Return model FLOPs a second, and what share that is of what the accelerator can do."""
    found = [run.flops_per_s for run in runs if run.flops_per_s is not None]
    if not found:
        return Cell("–", tone="muted")
    peak = results.machine.get("peak_flops_per_s")
    share = f"{median(found) / peak:.1%} of its peak" if isinstance(peak, int | float) and peak > 0 else ""
    return Cell(flops_a_second(median(found)), share)


def _cost(results: Results, arm: Arm) -> tuple[Cell, ...]:
    row = next((row for row in results.rows if row.arm == arm.name), None)
    rate = row.learning_rate if row else None
    runs = [
        run
        for run in results.runs
        if run.arm == arm.name and run.learning_rate == rate and run.status == "finished"
    ]  # fmt: skip
    train, teacher = (median([getattr(run, key) for run in runs] or [0.0]) for key in ("train_s", "teacher_s"))
    steps = median([run.steps for run in runs] or [0])
    trained = steps * arm.flops_a_token + arm.taught(steps) * arm.teacher_flops_a_token
    total = results.tokens_a_step * trained
    told = [Cell(seconds(train)), Cell(seconds(teacher) if arm.teacher_flops_a_token or teacher else "–")]
    told += [Cell(seconds(arm.calibration_s + arm.conversion_s + train), tone="best")]
    return (
        Cell(arm.name),
        Cell(f"{arm.num_parameters:,}"),
        Cell(seconds(arm.calibration_s) if arm.calibration_s else "–"),
        Cell(seconds(arm.conversion_s) if arm.conversion_s else "–"),
        *(told if runs else [Cell("–", tone="muted")] * 3),
        Cell(flops(arm.flops_a_token)),
        Cell(flops(arm.teacher_flops_a_token) or "–"),
        Cell(flops(total) if runs else "–"),
        _speed(results, runs),
    )


def costs(results: Results) -> Table:
    """Return what every arm costs before and while it is trained; seconds are medians over seeds."""
    columns = ("arm", "parameters", "calibration", "conversion", "training", "of it teacher", "in all")
    columns += ("FLOPs a token", "of the teacher", "training FLOPs", "model FLOPs a second")
    return Table(columns, tuple(_cost(results, arm) for arm in results.arms))


def lines(table: Table) -> tuple[Sequence[str], list[list[str]]]:
    """Return a table as a terminal shows it: headings with their groups; of second lines only what is amiss."""
    headings = list(table.columns)
    place = 0
    for group in table.groups:
        for i in range(place, place + group.count):
            headings[i] = f"{headings[i]} {group.short}".rstrip()
        place += group.count
    told = [[f"{cell.text} {cell.below if cell.tone == 'partial' else ''}" for cell in row] for row in table.rows]
    return headings, [[" ".join(text.split()) for text in row] for row in told]
