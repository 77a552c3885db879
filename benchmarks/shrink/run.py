"""How much a shrunk start saves: arms x learning rates x seeds on the same tokens, against random initialization.

    python -m benchmarks.shrink.run [--quick]

A Llama of about a million parameters is pretrained on novels (cached), cut to half its width, heads and feed-forward,
and each arm of arms.json is trained on the same batches. Rates are chosen on the validation books with the
first seed; every figure is of the test books.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.measure import write_results
from benchmarks.race import Job, raced, summary
from benchmarks.shrink.text import ARMS, SIZES, make, run_full, run_quick, scores_of, settings_of, takes_scores
from benchmarks.train.novels import NOVELS, Settings, held_out_loss, source, tokens

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
GOALS = ("random", "subcloning")


# In the records of runs that are kept.
_NAME = "half width"


def _arms_of(*, quick: bool) -> list[str]:
    return [name for name, arm in ARMS.items() if not quick or arm.get("quick")]


def _loss(model: Any, ids: torch.Tensor, settings: Settings) -> float:
    return held_out_loss(model.eval(), ids, settings, 192)


def _before(ids: torch.Tensor, settings: Settings, *, quick: bool) -> dict[str, float]:
    """Return the test loss before training of every arm that starts from weights of its own."""
    own = [name for name in _arms_of(quick=quick) if ARMS[name].keys() <= {"options", "init", "quick"}]
    jobs = {name: Job(_NAME, name, 0.0, 0, 0, 0, 0.0) for name in own}
    return {name: _loss(make(job, quick=quick)[0], ids, settings) for name, job in jobs.items()}


def main() -> None:
    """Run the suite and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer arms, steps and rates")
    parser.add_argument("--steps", type=int, default=None, help="training steps of every arm (default 800)")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="only these (random and subcloning always)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    asked = parser.parse_args()
    quick: bool = asked.quick
    whole: int = asked.steps or (400 if quick else 800)
    seeds, rates = ((0,), RATES[1:3]) if quick else ((0, 1, 2), RATES)
    if not NOVELS.is_dir():
        raise SystemExit(f"the novels are not here ({NOVELS.name}): this suite needs them")
    begin = time.perf_counter()
    settings = settings_of(quick=quick)
    home, made = source(settings)
    calibration_s = scores_of(settings)[1]
    arms = [name for name in _arms_of(quick=quick) if not asked.arms or name in (*asked.arms, *GOALS)]

    def job(arm: str, rate: float, seed: int) -> Job:
        steps = round(whole * ARMS[arm].get("share", 1.0))
        decay = ARMS[arm].get("weight_decay", settings.weight_decay)
        return Job(_NAME, arm, rate, seed, steps, whole, decay)

    runs = raced(arms, rates, seeds, job, run_quick if quick else run_full, asked.workers)
    extra = {name: calibration_s if takes_scores(name) else 0.0 for name in arms}
    table: dict[str, Any] = {"sizes": SIZES, "summary": summary(runs, GOALS, extra), "runs": runs}
    ids = tokens(settings)["test"]
    results = {
        "source": {**made, "test_loss": _loss(AutoModelForCausalLM.from_pretrained(home), ids, settings)},
        "steps": whole, "seeds": list(seeds), "rates": list(rates), "tokens_a_step": settings.batch * settings.context,
        "calibration_s": calibration_s, "suite_s": time.perf_counter() - begin,
        "before": {_NAME: _before(ids, settings, quick=quick)}, "tables": {_NAME: table},
    }  # fmt: skip
    write_results(__file__, results, seed=seeds[0], name="quick" if quick else "latest")
    for row in table["summary"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
