"""Curves, trials and strips: what is drawn is what the runs say."""

from __future__ import annotations

import itertools
from math import dist, nan
from random import Random

import pytest

from anysize.report.curves import curve, curves, missing, trials
from anysize.report.palette import DARK, DARK_GROUND, LIGHT, LIGHT_GROUND, looks
from anysize.report.schema import Kept, PlanRecord, Run
from anysize.report.strips import MAX_CELLS, strips
from tests.report.samples import looking_real, plan, small


def with_runs(*values: tuple[float, ...], status: str = "finished", rate: float = 0.01) -> tuple[Run, ...]:
    return tuple(
        Run(arm="ours", seed=i, learning_rate=rate, status=status, steps=90, at=(0, 10, 90)[: len(test)],  # pyright: ignore[reportArgumentType]
            validation=tuple(v + 1 for v in test), test=test, train_s=9.0 + i)
        for i, test in enumerate(values)
    )  # fmt: skip


def test_a_curve_is_the_median_and_the_range_over_seeds_at_the_best_rate() -> None:
    runs = with_runs((7.0, 5.0, 3.0), (7.5, 4.0, 3.5), (6.0, 6.0, 3.2)) + with_runs((1.0, 1.0, 1.0), rate=0.5)
    found = curve(small(runs=(*small().runs[:1], *runs)), "ours")
    assert found is not None
    assert (found.median, found.low, found.high) == ((7.0, 5.0, 3.2), (6.0, 4.0, 3.0), (7.5, 6.0, 3.5))
    assert (found.steps, found.tokens, found.num_seeds) == ((0, 10, 90), (0, 640, 5760), 3)


def test_seconds_begin_with_calibration_and_conversion() -> None:
    results = small(runs=(*small().runs[:1], *with_runs((7.0, 5.0, 3.0))))
    ours = results.arms[1].model_copy(update={"calibration_s": 11.0, "conversion_s": 2.0})
    found = curve(results.model_copy(update={"arms": (results.arms[0], ours)}), "ours")
    assert found is not None
    assert found.seconds == pytest.approx((13.0, 14.0, 22.0))


def test_trials_and_diverged_runs_are_no_curve() -> None:
    for status in ("trial", "diverged"):
        results = small(runs=(*small().runs[:1], *with_runs((7.0, nan), status=status)))
        assert curve(results, "ours") is None
        assert [found.arm for found in curves(results)] == ["random"]


def test_an_arm_without_a_row_is_missing() -> None:
    results = small(rows=small().rows[:1])
    assert (missing(results), [found.arm for found in curves(results)]) == (["ours"], ["random"])


def test_trials_tell_what_every_rate_came_to() -> None:
    runs = (
        with_runs((7.0, 5.0, 3.0), (7.0, 5.0, 4.0), (7.0, 5.0, 3.4))
        + with_runs((7.0, nan), status="diverged", rate=0.1)
        + with_runs((7.0, 6.5), status="trial", rate=0.001)
    )
    low, middle, high = (one for one in trials(small(runs=(*small().runs[:1], *runs))) if one.arm == "ours")
    assert (low.status, low.value, low.steps, low.best) == ("trial", 7.5, 90, False)
    assert (middle.status, middle.value, middle.num_runs, middle.best) == ("finished", 4.4, 3, True)
    assert (high.status, high.value, high.steps, high.best) == ("diverged", None, 10, False)


def test_a_rate_where_one_seed_diverged_says_so() -> None:
    runs = with_runs((7.0, 5.0, 3.0), (7.0, 5.0, 3.2)) + with_runs((7.0, nan), status="diverged")
    (found,) = (one for one in trials(small(runs=(*small().runs[:1], *runs))) if one.arm == "ours")
    assert (found.status, found.num_runs, found.num_diverged) == ("finished", 2, 1)


def test_strips_show_what_was_kept() -> None:
    record = PlanRecord(
        tensors=(), exact=False, layers=(0, 2, 2), num_source_layers=4,
        kept=(Kept(axis="kv", source_size=3, rows={"0": (0, 2), "1": (1, 2)}),),
    )  # fmt: skip
    layers, heads = strips(record)
    assert (layers.cells, layers.summary) == (((1.0, 0.0, 1.0, 0.0),), "2 of 4 used for 3")
    assert (heads.cells, heads.summary) == (((1.0, 0.0, 1.0), (0.0, 1.0, 1.0)), "2 of 3 kept each")


def test_wide_axes_share_cells_and_lose_nothing() -> None:
    size = 11_008
    kept = tuple(sorted(Random(0).sample(range(size), 5000)))
    record = PlanRecord(tensors=(), exact=False, kept=(Kept(axis="ffn", source_size=size, rows={"0": kept}),))
    (strip,) = strips(record)
    (cells,) = strip.cells
    assert len(cells) <= MAX_CELLS
    last = size - (len(cells) - 1) * strip.width
    total = sum(cells[:-1]) * strip.width + cells[-1] * last
    assert total == pytest.approx(5000, rel=1e-3)
    everything = Kept(axis="ffn", source_size=size, rows={"0": tuple(range(size))})
    assert set(strips(PlanRecord(tensors=(), exact=True, kept=(everything,)))[0].cells[0]) == {1.0}


def test_directions_are_scaled_to_the_strongest() -> None:
    found = strips(plan(Random(1), directions=True))[-1]
    assert max(max(row) for row in found.cells) == 1.0
    assert strips(PlanRecord(tensors=(), exact=True)) == []


def test_an_arm_looks_the_same_whatever_else_is_there() -> None:
    results = looking_real()
    look = looks(results)
    assert look["random"].colour == 0
    assert len({(one.colour, one.dash) for one in look.values()}) == len(results.arms)
    many = looks(small(*(f"arm {i}" for i in range(30)), goal=None))
    assert len(set(many.values())) == 30


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize(("colours", "ground"), [(LIGHT, LIGHT_GROUND), (DARK, DARK_GROUND)])
def test_every_colour_stands_out_from_its_ground(colours: tuple[str, ...], ground: str) -> None:
    assert len(set(colours)) == len(LIGHT) == len(DARK)
    assert all(contrast(colour, ground) >= 3 for colour in colours)
    assert contrast("#e69f00", LIGHT_GROUND) < 3


# What the cones of a kind of colour vision make of linear red, green and blue (Machado and others 2009, severity 1).
VISION = {
    "all cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deuteranopia": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritanopia": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


def seen(colour: str, vision: str) -> tuple[float, float, float]:
    """A colour as CIELAB, where distances are about as large as they look."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    red, green, blue = (
        min(1.0, max(0.0, sum(a * b for a, b in zip(row, linear, strict=True)))) for row in VISION[vision]
    )
    x = (0.4124 * red + 0.3576 * green + 0.1805 * blue) / 0.9505
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    z = (0.0193 * red + 0.1192 * green + 0.9505 * blue) / 1.089
    a, b, c = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return 116 * b - 16, 500 * (a - b), 200 * (b - c)


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_arms_are_told_apart_whatever_ones_colour_vision(colours: tuple[str, ...], vision: str) -> None:
    pairs = itertools.combinations([seen(colour, vision) for colour in colours], 2)
    assert min(dist(one, other) for one, other in pairs) >= 18


def test_a_grey_and_a_pink_of_one_lightness_are_not_told_apart() -> None:
    assert dist(seen("#667080", "deuteranopia"), seen("#a8457f", "deuteranopia")) < 5
    assert dist(seen("#667080", "all cones"), seen("#a8457f", "all cones")) > 30
