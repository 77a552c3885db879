"""Apply a plan from the command line: progress while it runs, the proof when it is done."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from anysize import api
from anysize.cli.options import Verify
from anysize.cli.progress import progress_bars
from anysize.cli.show import console, json_of, show_proof
from anysize.processes import rank_and_world
from anysize.recipe import Plan


def command_line() -> str:
    """Return the command as the user typed it."""
    return shlex.join(["anysize", *sys.argv[1:]])


class _Terminated(KeyboardInterrupt):
    """Someone, or a cluster whose time is up, ends the process."""


def _terminated(_: int, __: object) -> None:
    raise _Terminated


@contextmanager
def _ended_by(signal_number: int) -> Generator[None]:
    """While active, a signal ends what is under way as Ctrl-C does: processes that it has begun end with it."""
    # Where several train together, one that waits for the others in a library would not hear it.
    if rank_and_world()[1] > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal_number, _terminated)
    try:
        yield
    finally:
        signal.signal(signal_number, before)


@contextmanager
def keeping_work_on_interrupt() -> Generator[None]:
    """Turn Ctrl-C, and a cluster's SIGTERM, into a sentence and exit code 130, or 143; what was written stays, to be
    resumed."""
    with _told_of_the_end("the same command continues where it stopped"):
        yield


@contextmanager
def _told_of_the_end(what: str) -> Generator[None]:
    try:
        with _ended_by(signal.SIGTERM):
            yield
    except KeyboardInterrupt as interrupt:
        print(f"anysize: interrupted; {what}", file=sys.stderr)
        sys.exit(143 if isinstance(interrupt, _Terminated) else 130)


@contextmanager
def ending_on_interrupt() -> Generator[None]:
    """Do the same where there is no work to keep."""
    with _told_of_the_end("nothing was written"):
        yield


def carry_out(
    plan: Plan,
    output: Path,
    *,
    source: str | None = None,
    verify: Verify,
    max_shard_size: str,
    overwrite: bool,
    allow_nonfinite: bool,
    as_json: bool,
) -> None:
    """Write the plan's target to `output` and print the proof, as a table or as one JSON object."""
    with keeping_work_on_interrupt(), progress_bars(enabled=not as_json) as progress:
        made, proof = api.apply_with_proof(
            plan,
            output,
            source=source,
            verify=verify.value,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            command=command_line(),
            progress=progress,
        )
    if as_json:
        told = json_of(
            proof,
            output=str(made),
            exact=plan.exact,
            inexact_because=plan.inexact,
            num_parameters=plan.num_parameters,
            num_bytes=plan.num_bytes,
        )
        print(told)
        return
    show_proof(proof)
    console().print(f"made {made}: {plan.num_parameters:,} parameters, {plan.num_bytes:,} bytes")
