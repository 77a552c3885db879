"""The processes of a comparison: one for each GPU or core, that begin, fail and end with the one that began them."""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from anysize.comparison.job import Job
from anysize.comparison.legal import named
from anysize.errors import InputError

_log = logging.getLogger(__name__)


@contextmanager
def processes(asked: int | None) -> Generator[Executor]:
    """Give as many processes as are asked for, or one for each GPU, else for each core; they end with this one."""
    import torch  # noqa: PLC0415

    num_gpus = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")
    shared = (context.Value("i", 0), num_gpus)
    running = multiprocessing.active_children()
    count = asked or num_gpus or os.cpu_count() or 1
    # Inside, so that what is under way is not waited for; outside, for an interrupt while it is.
    with (
        _ended_with_us(running),
        ProcessPoolExecutor(count, context, enter, shared) as pool,
        _ended_with_us(running),
    ):
        yield pool


def _end_with_parent() -> None:
    """Wait for the end of the process that began this one, however it comes, and end as well."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def enter(counter: Any, num_gpus: int) -> None:
    """Give a process a GPU of its own, or one thread, and the end of the one that has begun it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    if num_gpus:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        visible = given.split(",") if given else [str(i) for i in range(num_gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % num_gpus]
    import torch  # noqa: PLC0415

    if not num_gpus:
        torch.set_num_threads(1)


@contextmanager
def _ended_with_us(others: Sequence[Any]) -> Generator[None]:
    """End the processes that have begun since, where someone interrupts: runs are recorded whole or not at all."""
    try:
        yield
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            if process not in others:
                process.terminate()
        raise


def each(pool: Executor, work: Callable[[Job], object], jobs: Sequence[Job], then: Callable[[int], None]) -> None:
    """Do some work on every job, and something each time that one is done, told how many are.

    What one of them raises says of which arm it was. It is told at once, and raised when the others have brought what
    they are at to its end, and the one that the pool already holds in hand for the next that is free. Raises
    InputError where a process is gone.
    """
    waiting: dict[Future[object], Job] = {}
    failures: list[Exception] = []
    num_done = 0
    try:
        for job in jobs:
            waiting[pool.submit(work, job)] = job
        # A pool looks whether processes live each time that it is asked for something, before it begins another for
        # that: without this, the end of the last one would show when some other one is done.
        pool.submit(int, 0)
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            try:
                with named(waiting[future].arm):
                    future.result()
            except BrokenProcessPool:
                raise
            except Exception as error:
                _cancel(waiting)
                if not failures and not all(other.done() for other in waiting):
                    _log.warning("anysize: %s; what is under way is brought to its end first", error)
                failures.append(error)
            else:
                num_done += 1
                then(num_done)
    except BrokenProcessPool as error:
        raise InputError(
            "a process of the comparison ended without a word, most often for want of memory: give fewer workers or a "
            "smaller batch; the same command goes on"
        ) from error
    finally:
        _cancel(waiting)
    if failures:
        raise failures[0]


def _cancel(waiting: Iterable[Future[object]]) -> None:
    for future in waiting:
        future.cancel()
