"""Figures on paper: the same bytes for the same results, and no text that breaks them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from anysize.report import plots
from anysize.report.plots import draw, draw_curves, draw_kept, draw_rates, label_of
from anysize.report.schema import Results
from tests.report.samples import HOSTILE, looking_real, small


def lines_of(figure: Figure, panel: int = 0) -> list[Any]:
    return list(figure.axes[panel].get_lines())


def test_curves_are_the_curves_and_the_goals() -> None:
    found = lines_of(draw_curves(small()))
    assert [list(line.get_ydata()) for line in found] == [[6.5, 5.5, 4.0], [6.5, 5.5, 3.5], [4.0, 4.0]]
    seconds = lines_of(draw_curves(small()), 1)
    assert list(seconds[1].get_xdata()) == pytest.approx([0, 1, 3, 9])


def test_no_formula_shows_on_an_axis_however_short() -> None:
    for results in (small(), looking_real(), small(rows=(), runs=())):
        for draw_one in (draw_curves, draw_rates):
            figure = draw_one(results)
            figure.draw_without_rendering()
            labels = [text.get_text() for axes in figure.axes for text in axes.get_xticklabels(which="both")]
            assert not [label for label in labels if "$" in label]
            assert any(label for label in labels) or not results.runs


def test_rates_mark_what_diverged() -> None:
    marks = [line.get_marker() for line in lines_of(draw_rates(looking_real()))]
    assert (marks.count("x"), marks.count("^")) == (1, 5)
    assert "x" not in [line.get_marker() for line in lines_of(draw_rates(small()))]


def test_kept_shows_every_part_of_every_plan() -> None:
    assert len(draw_kept(looking_real()).axes) == 4 * 5
    assert len(draw_kept(small()).axes) == 0


def test_figures_are_files_and_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first = draw(small())
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "red")
    assert draw(small()) == first
    assert mpl.rcParams["axes.facecolor"] == "red"
    assert draw(small(after={"ours": 3.4}))["curves.svg"] != first["curves.svg"]
    assert sorted(first) == [f"{name}.{kind}" for name in ("curves", "kept", "rates") for kind in ("png", "svg")]
    for name, data in first.items():
        if name.endswith(".png"):
            assert Image.open(io.BytesIO(data)).size[0] > 600
        else:
            assert ElementTree.fromstring(data).tag.endswith("svg")
            assert b"Date" not in data


def inches(figure: Figure) -> list[tuple[float, float]]:
    """Return where every axes of a figure ends, from its lower edge."""
    height = figure.get_figheight()
    return [(axes.get_position().y0 * height, axes.get_position().y1 * height) for axes in figure.axes]


@pytest.mark.parametrize(("drawing", "height"), [(draw_rates, 4.2), (draw_curves, 4.4)])
def test_a_figure_grows_with_its_key_and_its_axes_stay_as_high(
    drawing: Callable[[Results], Figure], height: float
) -> None:
    def arms(count: int) -> Figure:
        return drawing(small(*(f"arm {i} {'of a long name' * 3}" for i in range(count)), goal=None))

    with plots._styled():
        few, many, most = arms(4), arms(18), arms(60)
        for figure in (many, most):
            figure.draw_without_rendering()
    assert few.get_figheight() == height
    assert height < many.get_figheight() < most.get_figheight()
    for figure in (many, most):
        assert np.array(inches(figure)) == pytest.approx(np.array(inches(few)), abs=0.5)
    assert np.array(inches(many)) == pytest.approx(np.array(inches(most)))
    for figure in (many, most):
        key, drawn = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
        assert drawn.y1 < key.y0 < key.y1 <= figure.bbox.height


def test_hostile_and_foreign_names_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DRAWINGS", {"curves": draw_curves, "rates": draw_rates})
    names = ["random", HOSTILE, "_hidden", "$\\frac{", "模型 🦙", "a" * 300, "-->", "\u202eright to left"]
    for name, data in draw(small(*names)).items():
        if name.endswith(".svg"):
            assert ElementTree.fromstring(data).tag.endswith("svg")
            assert b"<script" not in data


def test_labels_are_one_short_line() -> None:
    assert label_of("a\n b\x00c") == "a\ufffd b\ufffdc"
    assert len(label_of("x" * 300)) == 48
    assert label_of("subspace + distillation") == "subspace + distillation"


def test_a_comparison_without_a_finished_run_has_figures() -> None:
    results = small(rows=(), runs=(), complete=False)
    assert "no run has finished" in [text.get_text() for text in draw_curves(results).axes[0].texts]
    assert len(draw_rates(results).axes) == 1
