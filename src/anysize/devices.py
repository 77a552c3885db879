"""Where models run and matrices are fitted: an accelerator where there is one, and room on it."""

from __future__ import annotations

import torch

from anysize.errors import InputError
from anysize.processes import local_rank

_CPU = torch.device("cpu")


def chosen_device(wanted: str) -> torch.device:
    """Return the device that "auto" means here, or the one that is named; raise InputError where it is not there."""
    if wanted == "auto":
        # Of several processes on a machine each has its own.
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return torch.device(f"cuda:{local_rank() % count}" if count else "cpu")
    try:
        torch.empty(1, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device '{wanted}' cannot be used: {' '.join(str(error).split())[:200]}") from error


def device_with(num_bytes: int) -> torch.device:
    """Return the accelerator where it has twice so many bytes free, else the CPU."""
    device = chosen_device("auto")
    return device if device == _CPU or 2 * num_bytes <= torch.cuda.mem_get_info(device)[0] else _CPU


def device_for_algebra(size: int) -> torch.device:
    """Return where matrices of double precision and this many rows are solved or decomposed."""
    # The matrix, its factors, a right-hand side, the result, and what the solver takes for itself.
    return device_with(8 * 8 * size**2)
