"""The search of each arm's learning rate: all with the first seed, halved on the way, the best with every seed.

With S steps and four rates, all four take S/8 steps, the better two S/4, and the best S: 4/8 + 2/4 + 1 = 2 runs. A
trial is a whole run with a schedule of its own, in which the rate decays to its end. Runs that are only paused on the
way would be compared before their rates have decayed, which favours low rates (docs/log.md has the measurement).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from anysize.report.schema import Run


def ladder(num_rates: int, steps: int) -> list[tuple[int, int]]:
    """Return (steps of a trial, how many rates go on after it) for every trial before the whole run."""
    rungs: list[int] = []
    left = num_rates
    while left > 1:
        left = (left + 1) // 2
        rungs.append(left)
    return [(max(1, steps >> (len(rungs) + 1 - i)), kept) for i, kept in enumerate(rungs)]


def score(run: Run) -> float:
    """Return what a rate is judged by: its last loss on validation data; a diverged run is worse than any."""
    return float("inf") if run.status == "diverged" or not run.validation else run.validation[-1]


def search(
    rates: Mapping[str, Sequence[float]], steps: Mapping[str, int], *, halving: bool,
    train: Callable[[list[tuple[str, float, int]]], list[Run]],
) -> dict[str, float]:  # fmt: skip
    """Return the best rate of every arm. `train` takes (arm, rate, steps) and returns runs in order.

    All arms climb their ladders side by side, so that there is work for every process. Where the rate that is left
    diverges in its whole run, the next best takes its place.
    """
    left = {arm: list(tried) for arm, tried in rates.items()}
    given_up: dict[str, list[float]] = {arm: [] for arm in rates}
    ladders = {arm: ladder(len(tried), steps[arm]) if halving else [] for arm, tried in rates.items()}
    while any(ladders.values()):
        asked = [(arm, rate, ladders[arm][0][0]) for arm in left if ladders[arm] for rate in left[arm]]
        runs = dict(zip(asked, train(list(asked)), strict=True))
        for arm in left:
            if ladders[arm]:
                step, kept = ladders[arm].pop(0)
                ranked = sorted(left[arm], key=lambda rate: score(runs[arm, rate, step]))
                left[arm] = ranked[:kept]
                # The last ones to go are the first to come back; those that diverged are not.
                given_up[arm] = [r for r in ranked[kept:] if isfinite(score(runs[arm, r, step]))] + given_up[arm]
    ends: dict[tuple[str, float, int], Run] = {}

    def end(arm: str, rate: float) -> float:
        return score(ends[arm, rate, steps[arm]])

    last = [(arm, rate, steps[arm]) for arm in left for rate in left[arm]]
    while last:
        ends |= zip(last, train(list(last)), strict=True)
        last = []
        for arm in left:
            # What wins short runs may diverge in a long one.
            if given_up[arm] and not any(isfinite(end(arm, rate)) for rate in left[arm]):
                left[arm].append(given_up[arm].pop(0))
                last.append((arm, left[arm][-1], steps[arm]))
    return {arm: min(left[arm], key=lambda rate: end(arm, rate)) for arm in left}
