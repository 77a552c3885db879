"""Run commands as a user would, and write what they cost with the machine and the versions beside it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from anysize.io.cache import cache_folder

# Novels, pictures and tasks lie beside the repository; benchmarks/README.md says what they are.
DATA = Path(os.environ.get("ANYSIZE_BENCH_DATA", Path(__file__).parents[2] / "shared" / "data")).resolve()
# What is trained once and kept: sources, and the finished runs of comparisons.
CACHE = cache_folder().resolve() / "benchmarks"


@dataclass(frozen=True)
class Run:
    """One finished process: wall time and its peak resident memory."""

    wall_s: float
    peak_bytes: int


def scratch_folder() -> Path:
    """Return the folder for the checkpoints that conversions are measured on, outside the repository."""
    folder = Path(os.environ.get("ANYSIZE_BENCH_CACHE", Path(tempfile.gettempdir()) / "anysize-bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _high_water(pid: int) -> int:
    """Return the peak resident bytes of a process as the kernel keeps them, 0 once it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in text.splitlines() if line.startswith("VmHWM")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def run(command: Sequence[str]) -> Run:
    """Run a command to its end; raise RuntimeError with its output if it fails.

    The peak is polled: what wait4 reports is never below the peak of the parent that forked the process.
    """
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.005)
        wall = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} exited {process.returncode}: {log.read()[-2000:].decode()}")
    return Run(wall, peak)


def anysize(*arguments: str) -> list[str]:
    """Return the command line of the installed `anysize`."""
    return [str(Path(sys.executable).with_name("anysize")), *arguments]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return minimum, median and maximum."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def write_results(script: str, results: Mapping[str, Any], *, seed: int = 0, name: str = "latest") -> Path:
    """Write a suite's results beside its script, with date, machine, versions and seed."""
    path = Path(script).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {
            "processor": platform.machine(),
            "num_cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "system": platform.system(),
        },
        "versions": {
            name: version(name) for name in ("anysize", "torch", "transformers", "safetensors", "numpy")
        } | {"python": platform.python_version()},
        "seed": seed,
        "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path
