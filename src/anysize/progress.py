"""How long work says where it is."""

from __future__ import annotations

from collections.abc import Callable

# (stage, how much of it is done, how much there is).
Progress = Callable[[str, int, int], None]


def quiet(stage: str, done: int, total: int) -> None:
    """Report nothing."""
    del stage, done, total
