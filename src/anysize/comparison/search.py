"""The search of each arm's learning rate: all with the first seed, halved on the way, the best with every seed.

With R rates, all run to S/2^k of the S steps (k the halvings that are needed), the better half of them to S/2^(k-1),
..., the last to S. Four rates cost 4/4 + 2/4 + 1/2 = 2 runs. Every rate follows the schedule of the whole run, so that
what is compared on the way is what the whole run does there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from anysize.report.schema import Run


def ladder(num_rates: int, steps: int) -> list[tuple[int, int]]:
    """Return (step, how many rates run on from there) for every rung before the last step."""
    rungs: list[int] = []
    left = num_rates
    while left > 1:
        left = (left + 1) // 2
        rungs.append(left)
    return [(max(1, steps >> (len(rungs) - i)), kept) for i, kept in enumerate(rungs)]


def score(run: Run) -> float:
    """Return what a rate is judged by: its last loss on validation data; a diverged run is worse than any."""
    return float("inf") if run.status == "diverged" or not run.validation else run.validation[-1]


def search(
    rates: Mapping[str, Sequence[float]], steps: Mapping[str, int], *, halving: bool,
    advance: Callable[[list[tuple[str, float, int | None]]], list[Run]],
) -> dict[str, float]:  # fmt: skip
    """Return the best rate of every arm. `advance` trains (arm, rate, step to stop at) and returns runs in order.

    All arms climb their ladders side by side, so that there is work for every process.
    """
    left = {arm: list(tried) for arm, tried in rates.items()}
    ladders = {arm: ladder(len(tried), steps[arm]) if halving else [] for arm, tried in rates.items()}
    while any(ladders.values()):
        asked = [(arm, rate, ladders[arm][0][0]) for arm in left if ladders[arm] for rate in left[arm]]
        runs = dict(zip(asked, advance(list(asked)), strict=True))
        for arm in left:
            if ladders[arm]:
                step, kept = ladders[arm].pop(0)
                left[arm] = sorted(left[arm], key=lambda rate: score(runs[arm, rate, step]))[:kept]
    last = [(arm, rate, None) for arm in left for rate in left[arm]]
    ends = dict(zip(last, advance(list(last)), strict=True))
    return {arm: min(left[arm], key=lambda rate: score(ends[arm, rate, None])) for arm in left}
