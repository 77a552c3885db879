"""What a resized start saves, measured by `anysize compare` itself: shrinking with and without a teacher, and growing.

    python -m benchmarks.train.run [shrink] [grow] [--quick]

The sources are pretrained on novels and cached. A suite is a config file beside this script; it goes on where it was
stopped. Results are those of the comparison, for `anysize report` and for the tables of the docs.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from anysize.cli.progress import progress_bars
from anysize.cli.show_training import show_comparison
from anysize.comparison.compare import compare
from anysize.comparison.config import compare_config
from anysize.report.schema import Results
from anysize.training.config_file import read_yaml, spelled
from benchmarks.race import CACHE
from benchmarks.shrink.source import NOVELS, Settings, source, write_unseen

HERE = Path(__file__).parent
SOURCES = {
    "shrink": Settings(),
    # Young and small: what trains beside it ends 0.1 nats/token and more below it.
    "grow": Settings(
        hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=2, steps=1100
    ),
}  # fmt: skip
_QUICK = {"learning_rates": [2e-3, 4e-3], "seeds": [0]}


def _in_half(raw: Any) -> Any:
    """Return a config in which whatever counts steps is half as much, shorter arms and their teachers included."""
    if not isinstance(raw, dict):
        return raw
    return {
        key: value // 2 if key in ("max_steps", "until_step") and isinstance(value, int) else _in_half(value)
        for key, value in raw.items()
    }


def config_of(suite: str, made: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Return the config of a suite: its file, with what its source cost."""
    raw = read_yaml(HERE / f"{suite}.yaml")
    settings = SOURCES[suite]
    tokens = settings.steps * settings.batch * settings.context
    raw["source_cost"] = {"train_s": made["cpu_s"], "train_tokens": tokens}
    if quick:
        raw |= {**_QUICK, "output": f"{suite}-quick"}
        raw = _in_half(raw)
    return raw


def run(suite: str, *, quick: bool, workers: int | None) -> Results:
    """Carry out a suite in the cache, where it is resumed, and write its results beside this script."""
    home, made = source(replace(SOURCES[suite], steps=800) if quick and suite == "shrink" else SOURCES[suite])
    # Paths in results are those of a place that looks alike everywhere.
    place = CACHE / "train" / f"{suite}-{home.name}"
    place.mkdir(parents=True, exist_ok=True)
    if not (place / "source").exists():
        (place / "source").symlink_to(home)
    write_unseen(place / "novels", SOURCES[suite])
    os.chdir(place)
    raw = config_of(suite, made, quick=quick)
    with progress_bars(enabled=True) as progress:
        command = f"python -m benchmarks.train.run {suite}{' --quick' if quick else ''}"
        config = compare_config({**raw, "workers": workers}, f"{suite}.yaml")
        results = compare(config, text=spelled(raw), command=command, progress=progress)
    target = HERE / "results" / f"{raw['output']}.json"
    target.parent.mkdir(exist_ok=True)
    results.save(target)
    show_comparison(results, target, as_json=False)
    return results


def main() -> None:
    """Run the suites that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[[], *SOURCES], help="all where none is named")
    parser.add_argument("--quick", action="store_true", help="one seed, two rates, half the steps")
    parser.add_argument("--workers", type=int, default=None, help="runs at a time (default: one a core)")
    asked = parser.parse_args()
    if not NOVELS.is_dir():
        raise SystemExit(f"the novels are not here ({NOVELS.name}): these suites need them")
    for suite in asked.suites or SOURCES:
        begin = time.perf_counter()
        run(suite, quick=asked.quick, workers=asked.workers)
        print(f"{suite}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
