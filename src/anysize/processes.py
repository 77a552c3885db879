"""The processes of one torchrun: who is who, sums over all of them, and waits that may take hours."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# While one process resizes or tokenizes the others wait, longer than backends are used to.
_PATIENCE = timedelta(hours=24)
# What threads of a backend take to let go of the tensors of the last sum, many times over.
_LETTING_GO_S = 0.2


def rank_and_world() -> tuple[int, int]:
    """Return (rank, number of processes) as torchrun sets them."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return which process of this machine it is, as torchrun sets it."""
    return int(os.environ.get("LOCAL_RANK", "0"))


@contextmanager
def _group() -> Generator[Any]:
    """Give a group of all processes that talks about tensors on the CPU, whatever backend is at work beside it."""
    import torch.distributed as dist  # noqa: PLC0415

    leave_at_the_end()
    if not dist.is_initialized():
        # Once: a second one would find the addresses of the first in the store of the torchrun.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def leave_at_the_end() -> None:
    """Have this process leave the group that it is about to enter, as it ends; one that it is in is its owner's.

    A thread of a backend that lets go of its last tensor while the interpreter is taken down aborts the process
    ("terminate called without an active exception").
    """
    import torch.distributed as dist  # noqa: PLC0415

    if rank_and_world()[1] > 1 and not dist.is_initialized():
        atexit.register(_leave)


def _leave() -> None:
    import torch.distributed as dist  # noqa: PLC0415

    if dist.is_initialized():
        dist.destroy_process_group()
        # Caches of sharded tensors still hold the group, so that its threads were not waited for; asleep, we hold
        # nothing that they need.
        time.sleep(_LETTING_GO_S)


def add_up(tensors: Iterable[torch.Tensor]) -> None:
    """Turn tensors on the CPU into their sums over all processes, in place; every process has to call this."""
    if rank_and_world()[1] == 1:
        return
    import torch.distributed as dist  # noqa: PLC0415

    with _group() as group:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)
        # Nobody leaves before all have what they need.
        dist.barrier(group=group)


def wait_for_all() -> None:
    """Return once every process has called this."""
    add_up(())


@contextmanager
def first_process_first() -> Generator[None]:
    """While the first process is inside, the others wait; then they follow. Where it fails, torchrun ends them all."""
    rank, _ = rank_and_world()
    if rank:
        wait_for_all()
    yield
    if not rank:
        wait_for_all()
