"""Progress of long work: bars on a terminal, one line a stage where standard error is piped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from anysize.progress import Progress, quiet

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
    "evaluate": "evaluate",
    "tasks": "run tasks",
}


def size_of(count: int) -> str:
    """Return a number of bytes as a person says it."""
    size = float(count)
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


# From what is done, how much there is, and how much is done in a second.
_COUNTED: dict[str, Callable[[int, int, float], str]] = {
    "write": lambda done, total, _: f"{size_of(done)} of {size_of(total)}",
    "tokens": lambda done, _total, _rate: f"{done:,} so far",
    "starts": lambda done, total, _: f"start {done} of {total}",
    "runs": lambda done, total, _: f"run {done} of {total}",
    "images": lambda done, _total, _rate: f"{done:,} so far",
    "train": lambda done, total, rate: f"{done:,} of {total:,}, {rate:,.0f}/s",
    "calibrate": lambda done, total, rate: f"{done:,} of {total:,}, {rate:,.0f}/s",
    "evaluate": lambda done, total, rate: f"{done:,} of {total:,}, {rate:,.0f}/s",
    "tasks": lambda done, total, rate: f"{done:,} of {total:,}, {rate:,.0f}/s",
    "search": lambda done, total, rate: f"{done:,} of {total:,} tokens, {rate:,.0f}/s",
    "fit": lambda done, total, _: f"layer {done} of {total}",
    "leave one out": lambda done, total, _: f"layer {done} of {total}",
}


@contextmanager
def progress_bars(*, enabled: bool) -> Generator[Progress]:
    """Yield a progress function: bars on a terminal, one line a stage where standard error is piped."""
    if not enabled:
        yield quiet
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
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}
        # Of each stage, when it was first heard of and what was done by then, by earlier processes perhaps.
        first: dict[str, tuple[float, int]] = {}

        def bar(stage: str, done: int, total: int) -> None:
            # The proofs cannot be counted: they show that they are at work, and for how long.
            counted = stage in _COUNTED
            if stage not in tasks:
                tasks[stage] = bars.add_task(_STAGES[stage], total=None, amount="")
            since, before = first.setdefault(stage, (time.monotonic(), done))
            rate = (done - before) / max(1e-9, time.monotonic() - since)
            amount = _COUNTED[stage](done, total, rate) if counted else ""
            bars.update(tasks[stage], completed=done, total=(total or None) if counted or done else None, amount=amount)

        yield bar
