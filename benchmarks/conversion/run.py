"""What a conversion costs beside copying its output: wall time as ratios in one run, and peak memory over sizes.

    python -m benchmarks.conversion.run [--quick] [--repeats 3]

A 250 M-parameter bf16 Llama is doubled in width. Beside each conversion the folder that it made is copied with
`cp -r`; the start-up is that of the same command on a tiny model. Memory is measured from 0.5 GB to 8 GB of output.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.measure import Run, anysize, run, scratch_folder, spread, write_results

ASKED = {"hypercloning": 2.0, "split": 4.0, "fresh": None}
SOURCE = llama_config(hidden=1024, ffn=2816, layers=14, heads=16, kv_heads=16, vocab=32768)
TINY = llama_config(hidden=64, ffn=96, layers=2, heads=4, kv_heads=4, vocab=128)
MEMORY_LAYERS = {"0.5 GB": (2, 1024), "1.7 GB": (14, 1024), "8 GB": (78, 1024)}


def _resize(source: Path, output: Path, preset: str, hidden: int, ffn: int) -> list[str]:
    sizes = ["--hidden-size", str(2 * hidden), "--intermediate-size", str(2 * ffn)]
    heads = ["--num-attention-heads", str(2 * (16 if hidden == 1024 else 4))]
    heads += ["--num-key-value-heads", str(2 * (16 if hidden == 1024 else 4))]
    return anysize(
        "resize", str(source), str(output), *sizes, *heads, "--preset", preset, "--verify", "off", "--overwrite"
    )


def _timed(command: list[str], made: Path) -> Run:
    """Run a command that makes a folder, from the same state each time: folder gone, nothing waiting for the disk."""
    shutil.rmtree(made, ignore_errors=True)
    os.sync()
    return run(command)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def time_conversions(work: Path, repeats: int) -> dict[str, Any]:
    """Return wall times and ratios for each preset; every repeat converts and copies, one after the other."""
    source, tiny, output, copied = (work / name for name in ("source-250m", "tiny", "output", "copied"))
    source_bytes = random_checkpoint(source, SOURCE)
    random_checkpoint(tiny, TINY)
    small = _resize(tiny, work / "tiny-output", "hypercloning", 64, 96)
    startups: list[float] = []
    found: dict[str, Any] = {"startup_asked_s": 4.0, "source_bytes": source_bytes}
    for preset, asked in ASKED.items():
        walls: list[float] = []
        copies: list[float] = []
        ratios: list[float] = []
        peak = 0
        for repeat in range(repeats + 1):
            startup = _timed(small, work / "tiny-output").wall_s
            made = _timed(_resize(source, output, preset, 1024, 2816), output)
            copy = _timed(["cp", "-r", str(output), str(copied)], copied)
            # The first round finds memory that the kernel has not touched yet, which costs more than the work itself.
            if repeat == 0:
                continue
            walls.append(made.wall_s)
            copies.append(copy.wall_s)
            startups.append(startup)
            ratios.append((made.wall_s - startup) / copy.wall_s)
            peak = max(peak, made.peak_bytes)
        found[preset] = {
            "output_bytes": _size(output),
            "wall_s": spread(walls),
            "copy_wall_s": spread(copies),
            "ratio_beyond_startup": spread(ratios),
            "ratio_asked": asked,
            "peak_bytes": peak,
            "peak_asked_bytes": 700_000_000,
        }
        print(preset, found[preset], flush=True)
    return {**found, "startup_s": spread(startups)}


def measure_memory(work: Path) -> dict[str, Any]:
    """Return the peak resident memory of conversions from 0.5 GB to 8 GB of output, deeper each time."""
    found: dict[str, Any] = {}
    for label, (layers, hidden) in MEMORY_LAYERS.items():
        source, output = work / f"source-{layers}", work / "output"
        random_checkpoint(source, {**SOURCE, "num_hidden_layers": layers})
        shutil.rmtree(output, ignore_errors=True)
        made = run(_resize(source, output, "split", hidden, 2816))
        found[label] = {"output_bytes": _size(output), "peak_bytes": made.peak_bytes, "wall_s": made.wall_s}
        print(label, found[label], flush=True)
        shutil.rmtree(output)
        shutil.rmtree(source)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat and no memory series")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    work = scratch_folder() / "conversion"
    results: dict[str, Any] = {"speed": time_conversions(work, 1 if arguments.quick else arguments.repeats)}
    if not arguments.quick:
        results["memory"] = measure_memory(work)
        print(write_results(__file__, results))
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
