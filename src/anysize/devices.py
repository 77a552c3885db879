"""Where models run and matrices are fitted: an accelerator where there is one, and room on it."""

from __future__ import annotations

import torch

from anysize.errors import InputError
from anysize.processes import local_rank

CPU = torch.device("cpu")


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


def _free_bytes(device: torch.device) -> int:
    """Return how many bytes of an accelerator tensors can take: what nobody holds, and what torch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def device_with(num_bytes: int, *, known: int = 0) -> torch.device:
    """Return the accelerator where it has room, else the CPU.

    num_bytes: an estimate, so that twice as many have to be free. known: what is needed beside them, exactly.
    """
    device = chosen_device("auto")
    return device if device == CPU or known + 2 * num_bytes <= _free_bytes(device) else CPU


def device_for_algebra(size: int) -> torch.device:
    """Return where matrices of double precision and this many rows are solved or decomposed."""
    # Six in all: the matrix, its factors, a right-hand side, the result, and two for the solver itself. Twice three.
    return device_with(3 * 8 * size**2)
