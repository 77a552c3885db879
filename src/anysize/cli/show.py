"""Print plans, proofs and inspections: rich tables on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from anysize.inspection import Inspection
from anysize.proof.verdict import Check, Verification
from anysize.recipe import Plan
from anysize.report.plans import plan_rows

if TYPE_CHECKING:
    from anysize.calibration.scores import Scores
    from anysize.report.schema import Reached, Results

_STAGES = {
    "tokens": "count tokens",
    "calibrate": "calibrate",
    "leave one out": "leave one out",
    "search": "search for layers",
    "fit": "fit layer by layer",
    "proof": "miniature proof",
    "write": "write",
    "verify": "compare whole models",
    "images": "decode images",
    "starts": "convert",
    "runs": "train runs",
    "train": "train",
}


@cache
def console() -> Console:
    """Return the console for results (standard output)."""
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if console().is_terminal:
        table = Table(title=title, title_justify="left", header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, emoji=False, highlight=False).print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def size_of(count: int) -> str:
    """Return a number of bytes as a person says it."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def say(line: str) -> None:
    """Print one line of the result."""
    console().print(line)


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """Print a plan: every kind of tensor with its arrow, shapes and operator, then sizes, bytes and exactness."""
    if as_json:
        print(json.dumps(plan.model_dump(mode="json")))
        return
    exact = "yes" if plan.exact else "no"
    rows = [[*words, str(count), exact] for *words, count in plan_rows(plan)]
    title = f"{plan.source.location} ({plan.model_type}) with preset {plan.preset}, seed {plan.seed}"
    _table(title, ["tensor", "reads -> writes", "source", "target", "how", "count", "exact?"], rows)
    out = console()
    growth = plan.num_parameters / max(1, plan.source_num_parameters)
    out.print(
        f"{plan.source_num_parameters:,} -> {plan.num_parameters:,} parameters (x {growth:.2f}), "
        f"{size_of(plan.source_num_bytes)} -> {size_of(plan.num_bytes)}, "
        f"peak memory about {size_of(plan.peak_bytes)} beside the interpreter",
    )
    for reason in plan.inexact:
        out.print(f"not exact: {reason}")
    for note in plan.notes:
        out.print(f"note: {note}")
    if plan.exact:
        out.print("exact: the target computes the same function as the source")


def _verdict(check: Check) -> str:
    if check.passed:
        return "pass"
    return "FAIL" if check.required else "differs"


def json_of(proof: Verification, **beside: object) -> str:
    """Return a proof with its verdict, and whatever else belongs to it, as one JSON object; NaN becomes null."""
    told = {"passed": proof.passed, "failures": proof.failures, "proof": json.loads(proof.model_dump_json())}
    return json.dumps(told | beside)


def show_proof(proof: Verification) -> None:
    """Print a proof: each figure with its tolerance, and beside it what a wrong answer measured."""
    rows = [
        [
            check.name,
            check.what,
            f"{check.measured:.2g}",
            f"{check.tolerance:.2g}",
            "" if check.control is None else f"{check.control:.2g}",
            check.unit,
            _verdict(check),
        ]
        for check in proof.checks
    ]
    _table("proof", ["check", "what", "measured", "allowed", "wrong answer", "unit", "verdict"], rows)
    for note in proof.notes:
        console().print(f"note: {note}")
    console().print("all proofs passed" if proof.passed else "NOT the same: " + "; ".join(proof.failures))


def show_inspection(found: Inspection, *, as_json: bool) -> None:
    """Print what a checkpoint holds."""
    if as_json:
        print(found.model_dump_json())
        return
    rows = [[name, f"{size:,}"] for name, size in found.sizes.items()]
    rows += [
        ["parameters", f"{found.num_parameters:,}"],
        ["bytes", size_of(found.num_bytes)],
        ["tensors", f"{found.num_tensors} in {found.num_files} file(s)"],
        ["storage", ", ".join(f"{dtype} x {count}" for dtype, count in found.dtypes.items())],
        ["tied head", "yes" if found.tied else "no"],
    ]
    rows += [[f"ignored {name}", reason] for name, reason in found.dropped.items()]
    if found.made_by:
        rows.append(["made by", found.made_by])
        rows.append(["exact", "yes" if found.exact else "no"])
    _table(f"{found.location}: {found.model_class}", ["what", "value"], rows)


_COUNTED: dict[str, Callable[[int, int, float], str]] = {
    "write": lambda done, total, _: f"{size_of(done)} of {size_of(total)}",
    "tokens": lambda done, _total, _seconds: f"{done:,} so far",
    "starts": lambda done, total, _: f"start {done} of {total}",
    "runs": lambda done, total, _: f"run {done} of {total}",
    "images": lambda done, _total, _seconds: f"{done:,} so far",
    "train": lambda done, total, seconds: f"{done:,} of {total:,}, {done / max(seconds, 1e-9):,.0f}/s",
    "calibrate": lambda done, total, seconds: f"{done:,} of {total:,}, {done / max(seconds, 1e-9):,.0f}/s",
    "search": lambda done, total, seconds: f"{done:,} of {total:,} tokens, {done / max(seconds, 1e-9):,.0f}/s",
    "fit": lambda done, total, _: f"layer {done} of {total}",
    "leave one out": lambda done, total, _: f"layer {done} of {total}",
}


def show_scores(scores: Scores, path: Path, *, as_json: bool) -> None:
    """Print what a calibration found: how much was read, and the scores of the layers."""
    record, blocks = scores.record, {kind: values for kind, values in scores.blocks.items() if values.dim() == 1}
    if as_json:
        told = {"output": str(path), "scores_sha256": scores.sha256, "num_bytes": path.stat().st_size}
        layers = {kind: values.tolist() for kind, values in scores.blocks.items()}
        print(json.dumps(record.model_dump() | told | {"layers": layers}))
        return
    rows = [
        [str(layer), *(f"{float(v):.4f}" for v in values)]
        for layer, values in enumerate(zip(*blocks.values(), strict=True))
    ]
    _table("layers: low scores can go", ["layer", *blocks], rows)
    unit = "images" if record.sequence_length == 0 else "tokens"
    size = size_of(path.stat().st_size)
    say(f"made {path}: {record.tokens:,} {unit} of {record.data}, {len(scores.sites)} sites, {size}")


def show_training(found: Mapping[str, Any], output: str, *, as_json: bool) -> None:
    """Print what a training run came to: held-out losses over its steps, tokens a second, and where it lies."""
    if as_json:
        print(json.dumps({"output": output, **found}))
        return
    curve: dict[str, dict[str, float]] = found["curve"]
    splits = list(next(iter(curve.values()), {}))
    if curve:
        rows = [[step, *(f"{losses[split]:.4f}" for split in splits)] for step, losses in curve.items()]
        _table("held-out loss", ["step", *splits], rows)
    rate = found["tokens"] / max(found["train_s"], 1e-9)
    say(f"made {output}: {found['steps']:,} steps, {found['tokens']:,} tokens, {rate:,.0f} a second of training")


def _share(reached: Reached | None) -> str:
    return "not reached" if reached is None else f"{reached.steps_share:.3f}"


def show_comparison(results: Results, path: Path, *, as_json: bool) -> None:
    """Print what every arm came to, and what it needs to come as far as each goal."""
    if as_json:
        print(results.model_dump_json())
        return
    rows = [
        [
            row.arm, f"{row.learning_rate:g}", f"{row.before:.4f}", f"{row.after:.4f}",
            *("1" if row.arm == goal else _share(row.reached.get(goal)) for goal in results.goals),
            *("1" if row.arm == goal else "" if (r := row.reached.get(goal)) is None else f"{r.seconds_share:.3f}"
              for goal in results.goals),
        ]
        for row in results.rows
    ]  # fmt: skip
    columns = ["arm", "rate", "before", "after", *(f"steps to {goal}'s" for goal in results.goals),
               *(f"seconds to {goal}'s" for goal in results.goals)]  # fmt: skip
    _table(f"{results.title}: {results.metric.name} in {results.metric.unit}, medians of {len(results.seeds)} seeds",
           columns, rows)  # fmt: skip
    for note in results.notes:
        say(f"note: {note}")
    say(f"made {path}; `anysize report {path.parent}` draws it")


@contextmanager
def progress_bars(*, enabled: bool) -> Generator[Callable[[str, int, int], None]]:
    """Yield a progress function: bars on a terminal, one line a stage where standard error is piped."""
    if not enabled:
        yield lambda _stage, _done, _total: None
        return
    if not sys.stderr.isatty():
        begun: set[str] = set()

        def line(stage: str, done: int, total: int) -> None:
            del done, total
            if stage not in begun:
                begun.add(stage)
                print(f"{_STAGES[stage]} ...", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        start = time.monotonic()

        def bar(stage: str, done: int, total: int) -> None:
            # The proofs cannot be counted: they show that they are at work, and for how long.
            counted = stage in _COUNTED
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES[stage], total=None, amount="")
            amount = _COUNTED[stage](done, total, time.monotonic() - start) if counted else ""
            bars.update(tasks[stage], completed=done, total=(total or None) if counted or done else None, amount=amount)

        yield bar
