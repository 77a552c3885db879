"""Which seconds count: of the processor where a run is on it, of the clock on an accelerator."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from anysize.flops import peak_flops

Clock = Callable[[], float]


def device_of_run(training: Mapping[str, Any]) -> torch.device:
    """Return where a run with these TrainingArguments computes."""
    on_cpu = bool(training.get("use_cpu")) or not torch.accelerator.is_available()
    return torch.device("cpu") if on_cpu else torch.device(torch.accelerator.current_accelerator() or "cpu")


def clock_of(device: torch.device) -> Clock:
    """Return a clock: of the processor for a CPU, of the wall once all work is done for an accelerator.

    On one that is shared, other work slows a run down; the processor counts its own.
    """
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        if device.type == "cuda" and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def peak_of(device: torch.device) -> tuple[str, float | None]:
    """Return the name of an accelerator and its dense bfloat16 operations a second; nothing for a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return name, peak_flops(name)


def seconds_of(device: torch.device) -> str:
    """Say whose seconds the clock of a device tells."""
    return "of the processor" if device.type == "cpu" else "of the clock"
