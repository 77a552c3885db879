"""The search of rates and the table: what they cost, what they choose, and what they say of arms that lose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anysize.comparison.search import ladder, search
from anysize.comparison.summary import best_rates, rows_of, steps_to
from anysize.report.schema import Arm, Run


def run(arm: str, rate: float, losses: list[float], *, seed: int = 0, steps: int = 100, **changes: object) -> Run:
    at = tuple(round(i * steps / (len(losses) - 1)) for i in range(len(losses))) if len(losses) > 1 else (0,)
    settings = {"status": "finished", "train_s": 50.0, **changes}
    return Run(arm=arm, seed=seed, learning_rate=rate, steps=steps, at=at, validation=tuple(losses),
               test=tuple(losses), **settings)  # type: ignore[arg-type]  # fmt: skip


def arm(name: str, **changes: float) -> Arm:
    return Arm(name=name, start="", command="", num_parameters=1, sizes={}, settings={},
               **{"flops_a_token": 6.0, **changes})  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(
    ("num_rates", "steps", "wanted"),
    [(1, 100, []), (2, 100, [(25, 1)]), (3, 100, [(12, 2), (25, 1)]), (4, 800, [(100, 2), (200, 1)]),
     (8, 800, [(50, 4), (100, 2), (200, 1)]), (4, 1, [(1, 2), (1, 1)])],
)  # fmt: skip
def test_ladders(num_rates: int, steps: int, wanted: list[tuple[int, int]]) -> None:
    assert ladder(num_rates, steps) == wanted


@given(st.integers(1, 16), st.integers(64, 5000))
def test_a_search_costs_little_more_than_two_runs(num_rates: int, steps: int) -> None:
    cost, left = 0, num_rates
    for trial, kept in ladder(num_rates, steps):
        cost, left = cost + left * trial, kept
    assert left == 1
    assert cost + steps <= steps * (2.0 if num_rates <= 4 else 3.1)


@given(st.dictionaries(st.floats(1e-4, 1e-1), st.floats(1, 9), min_size=1, max_size=8), st.booleans())
def test_the_best_rate_is_found_where_curves_do_not_cross(ends: dict[float, float], halving: bool) -> None:
    asked: list[tuple[str, float, int]] = []

    def train(jobs: list[tuple[str, float, int]]) -> list[Run]:
        asked.extend(jobs)
        return [run(arm, rate, [9.0, ends[rate]], steps=steps) for arm, rate, steps in jobs]

    found = search({"a": sorted(ends)}, {"a": 1000}, halving=halving, train=train)
    assert ends[found["a"]] == min(ends.values())
    assert len([job for job in asked if job[2] == 1000]) == (1 if halving else len(ends))


def test_a_diverged_rate_is_given_up_first() -> None:
    def train(jobs: list[tuple[str, float, int]]) -> list[Run]:
        return [run(a, r, [9.0, 1.0 if r > 1 else 5.0], status="diverged" if r > 1 else "trial") for a, r, _ in jobs]

    assert search({"a": [0.1, 2.0]}, {"a": 100}, halving=True, train=train) == {"a": 0.1}


def test_where_the_winner_of_trials_diverges_in_its_whole_run_the_next_best_takes_its_place() -> None:
    asked: list[tuple[float, int]] = []

    def train(jobs: list[tuple[str, float, int]]) -> list[Run]:
        asked.extend((rate, steps) for _, rate, steps in jobs)
        return [
            run(a, r, [9.0, 9.0 - r], steps=s, status="diverged" if r == 5 or (s == 800 and r > 2) else "finished")
            for a, r, s in jobs
        ]

    assert search({"a": [1, 2, 3, 4, 5]}, {"a": 800}, halving=True, train=train) == {"a": 2}
    assert [rate for rate, steps in asked if steps == 800] == [4, 3, 2]
    # Where every rate diverges there is none to take its place, and no rate is tried twice.
    assert search({"a": [5, 5.0]}, {"a": 800}, halving=True, train=train) == {"a": 5}


def test_steps_to_a_level_are_interpolated() -> None:
    curve = run("a", 1e-3, [5.0, 4.0, 3.0])
    assert steps_to(curve, 4.5) == 25
    assert steps_to(curve, 3.0) == 100
    assert steps_to(curve, 6.0) == 0
    assert steps_to(curve, 2.9) is None


def test_what_an_arm_needs_holds_all_that_it_costs() -> None:
    runs = [run("random", 1e-3, [8.0, 5.0, 4.0], train_s=100.0), run("ours", 1e-3, [6.0, 4.0, 3.0], train_s=200.0)]
    arms = {
        "random": arm("random", source_train_s=0, source_train_flops=0),
        "ours": arm(
            "ours",
            calibration_s=20,
            calibration_flops=500,
            conversion_flops=300,
            conversion_s=5,
            teacher_flops_a_token=2.0,
            source_train_s=1000,
            source_train_flops=6000,
        ),
    }
    row = {r.arm: r for r in rows_of(runs, arms, ["random"], 10)}["ours"]
    found = row.reached["random"]
    assert found is not None
    assert (found.steps, found.steps_share, found.tokens) == (50, 0.5, 500)
    assert found.flops == 800 + 50 * 10 * 8
    assert found.flops_share == pytest.approx(4800 / 6000)
    assert found.seconds == 20 + 5 + 100
    assert found.seconds_share == pytest.approx(1.25)
    # Its training counts where it is known.
    assert found.flops_share_with_source == pytest.approx((4800 + 6000) / 6000)
    assert found.seconds_share_with_source == pytest.approx((125 + 1000) / 100)
    # So does that of the goal, and what nobody knows is not guessed.
    arms["random"] = arm("random", source_train_s=300)
    found = {r.arm: r for r in rows_of(runs, arms, ["random"], 10)}["ours"].reached["random"]
    assert found is not None
    assert found.seconds_share_with_source == pytest.approx((125 + 1000) / (100 + 300))
    assert found.flops_share_with_source is None


def test_an_arm_that_a_seed_does_not_bring_there_is_not_reached() -> None:
    runs = [run("random", 1e-3, [8.0, 4.0]), run("random", 1e-3, [8.0, 4.0], seed=1),
            run("ours", 1e-3, [6.0, 3.0]), run("ours", 1e-3, [6.0, 5.0], seed=1)]  # fmt: skip
    rows = {r.arm: r for r in rows_of(runs, {n: arm(n) for n in ("random", "ours")}, ["random"], 1)}
    assert rows["ours"].reached == {"random": None}
    assert rows["ours"].after_of_seeds == (3.0, 5.0)
    assert rows["random"].reached == {}


def test_a_seed_that_diverged_counts_as_not_reached_and_the_dip_is_told() -> None:
    runs = [run("random", 1e-3, [8.0, 4.0]), run("ours", 1e-3, [5.0, 5.5, 3.0]),
            run("ours", 1e-3, [5.0], seed=1, status="diverged")]  # fmt: skip
    rows = {r.arm: r for r in rows_of(runs, {n: arm(n) for n in ("random", "ours")}, ["random"], 1)}
    assert rows["ours"].num_diverged == 1
    assert rows["ours"].reached == {"random": None}
    assert rows["ours"].rise == 0.5
    assert rows["random"].rise == 0.0


def test_a_trial_that_diverged_is_no_seed_that_did() -> None:
    goal, found = run("random", 1, [9.0, 5.0]), run("ours", 1, [8.0, 4.0])
    trial = run("ours", 1, [8.0, 8.0], steps=25, status="diverged")
    rows = rows_of([goal, found, trial], {"random": arm("random"), "ours": arm("ours")}, ["random"], 1)
    assert (rows[1].num_diverged, rows[1].reached["random"] is None) == (0, False)
    lost = run("ours", 1, [8.0, 8.0], seed=1, status="diverged")
    rows = rows_of([goal, found, lost], {"random": arm("random"), "ours": arm("ours")}, ["random"], 1)
    assert (rows[1].num_diverged, rows[1].reached["random"]) == (1, None)


def test_rates_are_chosen_on_validation_data_of_the_first_seed() -> None:
    better_on_test = run("a", 2e-3, [8.0, 4.0]).model_copy(update={"test": (8.0, 1.0)})
    runs = [run("a", 1e-3, [8.0, 3.0]), better_on_test, run("a", 4e-3, [8.0, 2.0], status="trial"),
            run("a", 1e-3, [8.0, 9.0], seed=1)]  # fmt: skip
    assert best_rates(runs) == {"a": 1e-3}
    # Where a search is done, a run that another one left in the folder has no say, and no seeds.
    assert [(r.learning_rate, r.num_seeds) for r in rows_of(runs, {"a": arm("a")}, [], 1)] == [(1e-3, 2)]
    rows = rows_of(runs, {"a": arm("a")}, [], 1, {"a": 2e-3})
    assert [(r.learning_rate, r.num_seeds) for r in rows] == [(2e-3, 1)]
