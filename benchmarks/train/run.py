"""What a resized start saves, measured by `anysize compare` itself: shrinking and growing, text and images.

    python -m benchmarks.train.run [SUITE ...] [--quick]

A suite is a config file beside this script; its sources are trained first and cached. It goes on where it was stopped.
Results are those of the comparison, for `anysize report` and for the tables of the docs.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anysize.cli.progress import progress_bars
from anysize.cli.show_training import show_comparison
from anysize.comparison.compare import compare
from anysize.comparison.config import compare_config
from anysize.report.schema import Results
from anysize.training.config_file import read_yaml, spelled
from benchmarks.measure import CACHE
from benchmarks.train import large, novels, pictures
from benchmarks.train.sources import Cost, Source
from benchmarks.train.stages import Stage

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Suite:
    """What the sources of a config file are made of, by the names that it has for them; the first is its `source`.

    data: the folder that its data are in. accelerated: whether it is for an accelerator, and refused without one.
    """

    sources: Mapping[str, Source]
    data: str = "novels"
    accelerated: bool = False


_LARGE = novels.Settings()
_HALF = replace(_LARGE, hidden_size=64, intermediate_size=172, num_attention_heads=4, num_key_value_heads=2)
_QUARTER = replace(_LARGE, hidden_size=32, intermediate_size=86, num_attention_heads=2, num_key_value_heads=1)
# Young and small: what trains beside it ends 0.1 nats/token and more below it.
_YOUNG = replace(_HALF, steps=1100)
_YOUNGER = replace(_HALF, steps=900)
_YOUNG_LARGE = large.Text(hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=4,
                          steps=300)  # fmt: skip
# On the way from it to twice of everything.
_WIDE = {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8, "num_key_value_heads": 4}
_BETWEEN = {"hidden_size": 96, "intermediate_size": 258, "num_attention_heads": 6, "num_key_value_heads": 3}
SUITES = {
    "shrink": Suite({"source": _LARGE}),
    "shrink-ablations": Suite({"source": _LARGE}),
    "shrink-depth": Suite({"source": _LARGE}),
    "shrink-further": Suite({"source": _LARGE, "closer": _HALF}),
    "shrink-vision": Suite({"source": pictures.Settings()}, data="images"),
    "grow": Suite({"source": _YOUNG}),
    "grow-recipes": Suite({"source": _YOUNG}),
    "grow-in-stages": Suite({"source": _YOUNG, "wide": Stage(_YOUNG, _WIDE),
                             "deep": Stage(_YOUNG, {"num_hidden_layers": 8}),
                             "between": Stage(_YOUNG, {**_BETWEEN, "num_hidden_layers": 6})}),
    "grow-by-half": Suite({"source": _YOUNGER}),
    "grow-ages": Suite({"source": replace(_QUARTER, steps=6000), "young": replace(_QUARTER, steps=500),
                        "older": replace(_QUARTER, steps=2000)}),
    "shrink-large": Suite({"source": large.Text()}, accelerated=True),
    "shrink-vision-large": Suite({"source": large.Pictures()}, data="images", accelerated=True),
    "grow-large": Suite({"source": _YOUNG_LARGE}, accelerated=True),
}  # fmt: skip
# A quick run has this part of the steps, of sources and of arms, and measures so often.
_QUICK_PART, _QUICK_EVALUATIONS = 4, 8
_COUNTS_STEPS = ("max_steps", "until_step", "fade_steps", "warmup_steps", "old_warmup_steps")


def _in_part(raw: Any) -> Any:
    """Return a config in which whatever counts steps is a part of it, shorter arms and their teachers included."""
    if not isinstance(raw, dict):
        return raw
    return {
        key: value // _QUICK_PART if key in _COUNTS_STEPS and isinstance(value, int) else _in_part(value)
        for key, value in raw.items()
    }


def in_short(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a suite's quick run: one seed, two rates, a part of the steps."""
    less = {"learning_rates": raw["learning_rates"][:2], "seeds": [0], "evaluations": _QUICK_EVALUATIONS}
    return _in_part(raw | less | {"output": f"{raw['output']}-quick"})


def _with_costs(raw: dict[str, Any], costs: Mapping[str, Cost]) -> dict[str, Any]:
    """Return a config that says what the training of each of its sources took."""
    arms = {
        name: arm | {"source_cost": costs[arm["source"]]} if "source" in arm else arm
        for name, arm in raw["arms"].items()
    }
    return raw | {"source_cost": costs[raw["source"]], "arms": arms}


def run(name: str, *, quick: bool, workers: int | None) -> Results:
    """Carry out a suite in the cache, where it is resumed, and write its results beside this script."""
    suite, raw = SUITES[name], read_yaml(HERE / f"{name}.yaml")
    with progress_bars(enabled=True) as progress:
        costs: dict[str, Cost] = {}
        homes: dict[str, Path] = {}
        for source, whole in suite.sources.items():
            homes[source], costs[source] = (whole.shorter(_QUICK_PART) if quick else whole).made(progress)
        # Paths in results are those of a place that looks alike everywhere.
        place = CACHE / "train" / "-".join([name, *(home.name for home in homes.values())])
        place.mkdir(parents=True, exist_ok=True)
        for source, home in homes.items():
            if not (place / source).exists():
                (place / source).symlink_to(home)
        next(iter(suite.sources.values())).write_data(place / suite.data)
        os.chdir(place)
        raw = _with_costs(raw, costs)
        raw = in_short(raw) if quick else raw
        command = f"python -m benchmarks.train.run {name}{' --quick' if quick else ''}"
        config = compare_config({**raw, "workers": workers}, f"{name}.yaml")
        results = compare(config, text=spelled(raw), command=command, progress=progress)
    target = HERE / "results" / f"{raw['output']}.json"
    target.parent.mkdir(exist_ok=True)
    results.save(target)
    show_comparison(results, target, as_json=False)
    return results


def main() -> None:
    """Run the suites that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], help="where none is named, all for processors")
    parser.add_argument("--quick", action="store_true", help="one seed, two rates, a quarter of the steps")
    parser.add_argument("--workers", type=int, default=None, help="runs at a time (default: one a core)")
    asked = parser.parse_args()
    suites: list[str] = asked.suites or [name for name, suite in SUITES.items() if not suite.accelerated]
    fast = [name for name in suites if SUITES[name].accelerated]
    if fast and len(fast) < len(suites):
        raise SystemExit(
            f"{', '.join(fast)}: suites for an accelerator are run by themselves, the others on processors"
        )
    if not fast:
        # Their sources are trained on processors, and two kinds of seconds cannot be compared.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        raise SystemExit(f"{', '.join(fast)}: for an accelerator, and there is none here")
    for name in suites:
        folder = novels.NOVELS if SUITES[name].data == "novels" else pictures.IMAGES
        if not folder.is_dir():
            raise SystemExit(f"{folder} is not there: {name} needs it, see benchmarks/README.md")
    for name in suites:
        begin = time.perf_counter()
        run(name, quick=asked.quick, workers=asked.workers)
        print(f"{name}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
