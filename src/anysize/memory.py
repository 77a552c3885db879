"""How much memory is free, and what may be held in it."""

from __future__ import annotations

import psutil

_FLOAT32_BYTES = 4


def free_bytes() -> int:
    """Return how many bytes could be taken now without anything having to go."""
    return psutil.virtual_memory().available


def fits_in_memory(num_parameters: int) -> bool:
    """Whether models of so many parameters in float32 take at most a quarter of the memory that is free now."""
    return num_parameters * _FLOAT32_BYTES <= free_bytes() / 4
