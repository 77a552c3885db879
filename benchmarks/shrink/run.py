"""How much a shrunk start saves: arms x learning rates x seeds on the same tokens, against random initialization.

    python -m benchmarks.shrink.run [--quick]

A Llama of about a million parameters is pretrained on novels (cached), cut to half its width, heads and feed-forward
(and depth), and each arm of arms.json is trained on the same batches. Rates are chosen on the validation books with the
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
from benchmarks.shrink.source import NOVELS, Settings, held_out_loss, source, tokens
from benchmarks.shrink.text import ARMS, SUITES, make, run_full, run_quick, scores_of, settings_of, takes_scores

RATES = (1e-3, 2e-3, 4e-3, 8e-3)
GOALS = ("random", "subcloning")


def _arms_of(suite: str, *, quick: bool) -> list[str]:
    return [name for name, arm in ARMS.items() if suite in arm["suites"] and (not quick or arm.get("quick"))]


def _loss(model: Any, ids: torch.Tensor, settings: Settings) -> float:
    return held_out_loss(model.eval(), ids, settings, 192)


def _before(suite: str, ids: torch.Tensor, settings: Settings, *, quick: bool) -> dict[str, float]:
    """Return the test loss before training of every arm that starts from weights of its own."""
    own = [name for name in _arms_of(suite, quick=quick) if ARMS[name].keys() <= {"options", "init", "suites", "quick"}]
    jobs = {name: Job(suite, name, 0.0, 0, 0, 0, 0.0) for name in own}
    return {name: _loss(make(job, quick=quick)[0], ids, settings) for name, job in jobs.items()}


def main() -> None:
    """Run the suite and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer arms, steps and rates")
    parser.add_argument("--steps", type=int, default=None, help="training steps of every arm (default 800)")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="only these (random and subcloning always)")
    parser.add_argument("--suites", nargs="*", choices=list(SUITES), default=list(SUITES))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    asked = parser.parse_args()
    quick: bool = asked.quick
    whole: int = asked.steps or (400 if quick else 800)
    seeds, rates = ((0,), RATES[1:3]) if quick else ((0, 1, 2), RATES)
    if not NOVELS.is_dir():
        raise SystemExit(f"the novels are not here ({NOVELS.name}): this suite needs them")
    begin = time.perf_counter()
    settings = settings_of("random", quick=quick)
    home, made = source(settings)
    calibration_s = scores_of(settings)[1]
    tables: dict[str, Any] = {}
    for suite in ("half width",) if quick else asked.suites:
        arms = [name for name in _arms_of(suite, quick=quick) if not asked.arms or name in (*asked.arms, *GOALS)]

        def job(arm: str, rate: float, seed: int, suite: str = suite) -> Job:
            steps = round(whole * ARMS[arm].get("share", 1.0))
            decay = ARMS[arm].get("weight_decay", settings.weight_decay)
            return Job(suite, arm, rate, seed, steps, whole, decay)

        # What every process would otherwise make at once.
        own = {name: settings_of(name, quick=quick) for name in arms}
        extra = {name: scores_of(own[name])[1] if takes_scores(name, suite, own[name]) else 0.0 for name in arms}
        runs = raced(arms, rates, seeds, job, run_quick if quick else run_full, asked.workers)
        tables[suite] = {"sizes": SUITES[suite], "summary": summary(runs, GOALS, extra), "runs": runs}
    ids = tokens(settings)["test"]
    results = {
        "source": {**made, "test_loss": _loss(AutoModelForCausalLM.from_pretrained(home), ids, settings)},
        "steps": whole, "seeds": list(seeds), "rates": list(rates), "tokens_a_step": settings.batch * settings.context,
        "calibration_s": calibration_s, "suite_s": time.perf_counter() - begin,
        "before": {suite: _before(suite, ids, settings, quick=quick) for suite in list(SUITES)[:2]}, "tables": tables,
    }  # fmt: skip
    write_results(__file__, results, seed=seeds[0], name="quick" if quick else "latest")
    for name, table in tables.items():
        print(name)
        for row in table["summary"]:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
