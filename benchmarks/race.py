"""Races: the same training budget for every arm, rates chosen on validation data, medians over seeds on test data.

A job is one training run. Jobs run in as many processes as there are cores, one thread each, so that their times are
comparable; each is cached under its settings and the weights that it starts from: a stopped suite goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from benchmarks.measure import CACHE


@dataclass(frozen=True)
class Job:
    """One training run of one arm. `whole` is the budget of the race; a job with fewer steps decays its rate sooner."""

    suite: str
    arm: str
    rate: float
    seed: int
    steps: int
    whole: int
    weight_decay: float


Found = dict[str, Any]
# Makes the model that a job starts from: (model, seconds that the making took).
Make = Callable[[Job], tuple[Any, float]]
# Trains it: losses by split at the steps, and the seconds of training alone.
Train = Callable[[Any, Job], Found]


def carry_out(job: Job, make: Make, train: Train, trained_by: str) -> Found:
    """Return what one job found, from the cache where it is there.

    trained_by: whatever else than the job and the weights decides what is found: data, batches, teachers.
    """
    model, conversion_s = make(job)
    digest = hashlib.sha256(json.dumps([asdict(job), trained_by], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    cached = CACHE / "races" / f"{digest.hexdigest()[:24]}.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    found: Found = {**asdict(job), "conversion_s": conversion_s, **train(model, job)}
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found))
    partial.replace(cached)
    name = f"{job.suite}, {job.arm}"
    print(f"{name:44} rate {job.rate:g} seed {job.seed} steps {job.steps}: {found['test'][0]:.3f} -> "
          f"{found['test'][-1]:.3f}, {found['train_s']:.0f} s", flush=True)  # fmt: skip
    return found


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def carry_out_all(jobs: Sequence[Job], run: Callable[[Job], Found], workers: int) -> list[Found]:
    """Return what every job found, in order; `run` is a function of a module, so that other processes find it."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
        return list(pool.map(run, jobs))


def raced(
    arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int], make_job: Callable[[str, float, int], Job],
    run: Callable[[Job], Found], workers: int,
) -> list[Found]:  # fmt: skip
    """Return the runs of every arm: all rates with the first seed, and the best on validation data with the others."""
    tuning = carry_out_all([make_job(arm, rate, seeds[0]) for arm in arms for rate in rates], run, workers)
    best = best_rates(tuning)
    rest = [make_job(arm, best[arm], seed) for seed in seeds[1:] for arm in arms]
    return tuning + carry_out_all(rest, run, workers)


def best_rates(runs: Sequence[Found]) -> dict[str, float]:
    """Return, of each arm, the rate whose first seed ended lowest on validation data."""
    found: dict[str, float] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        first = min(run["seed"] for run in runs if run["arm"] == arm)
        tried = [run for run in runs if run["arm"] == arm and run["seed"] == first]
        found[arm] = min(tried, key=lambda run: run["validation"][-1])["rate"]
    return found


def chosen(runs: Sequence[Found]) -> dict[str, list[Found]]:
    """Return the runs of each arm at its best rate."""
    best = best_rates(runs)
    return {arm: [r for r in runs if r["arm"] == arm and r["rate"] == rate] for arm, rate in best.items()}


def steps_to(run: Found, level: float) -> float | None:
    """Return the (interpolated) step at which a run's test loss first is at a level; None where it never is."""
    points: list[tuple[int, float]] = list(zip(run["at"], run["test"], strict=True))
    if points[0][1] <= level:
        return 0.0
    for (a, before), (b, after) in itertools.pairwise(points):
        if after <= level:
            return a + (b - a) * (before - level) / (before - after)
    return None


def _median(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if len(there) == len(values) else None


def summary(runs: Sequence[Found], goals: Sequence[str], extra_s: dict[str, float]) -> list[Found]:
    """Return a row an arm: medians over seeds, and the share of the goals' steps and seconds to their final losses.

    `extra_s` are an arm's costs before conversion (calibration). An arm that not every seed brought there has None.
    """
    of = chosen(runs)
    ends = {arm: median(r["test"][-1] for r in found) for arm, found in of.items()}
    rows: list[Found] = []
    for arm, found in of.items():
        conversion_s, train_s = (median(r[k] for r in found) for k in ("conversion_s", "train_s"))
        row: Found = {
            "arm": arm, "rate": found[0]["rate"], "seeds": len(found), "steps": found[0]["steps"],
            "loss_before": median(r["test"][0] for r in found), "loss_after": ends[arm],
            "loss_after_of_seeds": [r["test"][-1] for r in found], "conversion_s": conversion_s,
            "calibration_s": extra_s.get(arm, 0.0), "train_s": train_s, "steps_share": {}, "seconds_share": {},
        }  # fmt: skip
        for goal in (goal for goal in goals if goal in of):
            steps = _median([steps_to(r, ends[goal]) for r in found])
            row["steps_share"][goal] = row["seconds_share"][goal] = None
            if steps is not None:
                spent = row["calibration_s"] + conversion_s + train_s * steps / found[0]["steps"]
                row["steps_share"][goal] = steps / of[goal][0]["steps"]
                row["seconds_share"][goal] = spent / median(r["train_s"] for r in of[goal])
        rows.append(row)
    return rows


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return a call's result and its seconds of processor time, which other work on the machine does not change."""
    begin = time.process_time()
    return call(), time.process_time() - begin
