"""From runs to a table: what every arm needs, against the final loss of another, with all that it costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from statistics import median

from anysize.comparison.search import score
from anysize.report.schema import Arm, Reached, Row, Run


def best_rates(runs: Sequence[Run]) -> dict[str, float]:
    """Return, of each arm, the rate whose first seed ended lowest on validation data; arms without one are left out."""
    found: dict[str, float] = {}
    for arm in dict.fromkeys(run.arm for run in runs):
        tried = [run for run in runs if run.arm == arm and run.status == "finished"]
        if tried:
            first = tried[0].seed
            found[arm] = min((run for run in tried if run.seed == first), key=score).learning_rate
    return found


def steps_to(run: Run, level: float) -> float | None:
    """Return the (interpolated) step at which a run's test figure first is at a level; None where it never is."""
    points = list(zip(run.at, run.test, strict=True))
    if points and points[0][1] <= level:
        return float(points[0][0])
    for (a, before), (b, after) in itertools.pairwise(points):
        if after <= level:
            return a + (b - a) * (before - level) / (before - after)
    return None


def _reached(runs: Sequence[Run], arm: Arm, goal: Sequence[Run], goal_arm: Arm, tokens_a_step: int) -> Reached | None:
    level = median(run.test[-1] for run in goal)
    found = [steps_to(run, level) for run in runs]
    there = [steps for steps in found if steps is not None]
    if len(there) < len(found) or not there:
        return None
    steps, whole = median(there), goal[0].steps
    seconds, goal_seconds = _seconds(arm, runs, steps), _seconds(goal_arm, goal, whole)
    flops, goal_flops = _flops(arm, steps, tokens_a_step), _flops(goal_arm, whole, tokens_a_step)
    own_s, own_flops = arm.source_train_s, arm.source_train_flops
    goal_s, goal_own_flops = goal_arm.source_train_s, goal_arm.source_train_flops
    return Reached(
        steps=steps, tokens=steps * tokens_a_step, flops=flops, seconds=seconds, steps_share=steps / whole,
        flops_share=flops / goal_flops if goal_flops else 0.0, seconds_share=seconds / max(1e-9, goal_seconds),
        flops_share_with_source=None if own_flops is None or goal_own_flops is None
        else (flops + own_flops) / max(1e-9, goal_flops + goal_own_flops),
        seconds_share_with_source=None if own_s is None or goal_s is None
        else (seconds + own_s) / max(1e-9, goal_seconds + goal_s),
    )  # fmt: skip


def _flops(arm: Arm, steps: float, tokens_a_step: int) -> float:
    training = steps * arm.flops_a_token + arm.taught(steps) * arm.teacher_flops_a_token
    return arm.calibration_flops + arm.conversion_flops + tokens_a_step * training


def _seconds(arm: Arm, runs: Sequence[Run], steps: float) -> float:
    """Return what an arm takes for so many steps: medians over seeds, the teacher's only while it is listened to.

    The first step is taken whole: what is compiled in it is compiled however few follow.
    """
    whole = runs[0].steps
    first = median(run.first_s for run in runs) if steps else 0.0
    own = first + median(run.own_s for run in runs) * steps / whole
    taught = median(run.teacher_s for run in runs) * arm.taught(steps) / max(1e-9, arm.taught(whole))
    return arm.calibration_s + arm.conversion_s + own + taught


def rows_of(
    runs: Sequence[Run], arms: Mapping[str, Arm], goals: Sequence[str], tokens_a_step: int,
    chosen: Mapping[str, float] | None = None,
) -> tuple[Row, ...]:  # fmt: skip
    """Return a row an arm at its best rate: medians over seeds. Arms without a finished run have none.

    chosen: the rates that the search found best, at which all seeds ran; without it, of the runs that there are.
    """
    best = {arm: (chosen or {}).get(arm, rate) for arm, rate in best_rates(runs).items()}
    finished = {
        arm: [r for r in runs if r.arm == arm and r.learning_rate == rate and r.status == "finished"]
        for arm, rate in best.items()
    }
    finished = {arm: found for arm, found in finished.items() if found}
    made: list[Row] = []
    for arm, found in finished.items():
        # A trial that diverged warmed up faster, and a seed that diverged did not come anywhere.
        lost = [r for r in runs if r.arm == arm and r.learning_rate == best[arm] and r.status == "diverged"
                and r.steps == found[0].steps]  # fmt: skip
        reached = {
            goal: None if lost else _reached(found, arms[arm], finished[goal], arms[goal], tokens_a_step)
            for goal in goals
            if goal in finished and goal != arm
        }
        ends = tuple(run.test[-1] for run in found)
        made.append(
            Row(arm=arm, learning_rate=best[arm], num_seeds=len(found), num_diverged=len(lost),
                before=median(run.test[0] for run in found), after=median(ends), after_of_seeds=ends,
                rise=max(max(run.test) - run.test[0] for run in found),
                train_s=median(run.train_s for run in found), reached=reached)
        )  # fmt: skip
    return tuple(made)
