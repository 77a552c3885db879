"""How much memory is free, and what may be held in it."""

from __future__ import annotations

from pathlib import Path

import psutil

_FLOAT32_BYTES = 4
_CGROUP = Path("/sys/fs/cgroup")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # There is none, or it says "max".
        return None


def _left_to_group(group: Path) -> int | None:
    """Return what is left of the limit of a control group (a container's), None where it has none.

    Versions 2 and 1 of the kernel's interface; cached files that can go do not count as taken.
    """
    for limit, taken, cached in (
        ("memory.max", "memory.current", "inactive_file "),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file "),
    ):
        most, now = _number(group / limit), _number(group / taken)
        if most is None or now is None:
            continue
        try:
            lines = (group / limit).with_name("memory.stat").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
        can_go = next((int(line.split()[1]) for line in lines if line.startswith(cached)), 0)
        return max(0, most - now + can_go)
    return None


def free_bytes() -> int:
    """Return how many bytes could be taken now without anything having to go, in a container too."""
    free, left = psutil.virtual_memory().available, _left_to_group(_CGROUP)
    return free if left is None else min(free, left)


def fits_in_memory(num_parameters: int) -> bool:
    """Whether models of so many parameters in float32 take at most a quarter of the memory that is free now."""
    return num_parameters * _FLOAT32_BYTES <= free_bytes() / 4
