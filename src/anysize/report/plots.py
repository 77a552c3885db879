"""Figures on paper: the curves, the rates and what was kept, as PNG and SVG; the same bytes for the same results."""

from __future__ import annotations

import io
import unicodedata
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from anysize.report.curves import Curve, curves, trials
from anysize.report.palette import LIGHT, looks
from anysize.report.schema import Results
from anysize.report.strips import Strip, strips

_INK, _MUTED, _LINE, _EMPTY = "#15191e", "#5b6570", "#dfe3e8", "#eceff2"
_MAX_NAME = 48
_MOST_CELLS_WITH_EDGES = 16
_ARMS_A_BAND = 4
# A key of more rows makes its figure higher, and not its axes lower.
_KEY_ROWS = 4
_KEY_ROW_INCHES = 0.205
_STYLES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.5)), "dashdot": (0, (5, 2, 1, 2))}
_SETTINGS: Any = {
    "svg.hashsalt": "anysize",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "savefig.dpi": 160,
}


@contextmanager
def _styled() -> Generator[None]:
    with mpl.rc_context(), warnings.catch_warnings():
        # What a reader has set up for their own figures must not change these.
        mpl.rcdefaults()
        mpl.rcParams.update(_SETTINGS)
        # A name may hold letters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")
        warnings.filterwarnings("ignore", message=r"Matplotlib currently does not support")
        yield


def label_of(text: str) -> str:
    """Return text that any figure can show: one line, no control characters, not too long."""
    shown = "".join("\ufffd" if unicodedata.category(letter) in {"Cc", "Cs", "Cn", "Co"} else letter for letter in text)
    shown = " ".join(shown.split())
    return shown if len(shown) <= _MAX_NAME else f"{shown[: _MAX_NAME - 1]}…"


def _lay_out(
    figure: Figure, handles: list[Any], names: list[str], *, left: float, right: float, bottom: float, top: float,
    wspace: float | None = None,
) -> None:  # fmt: skip
    """Draw the key above the axes and place these; margins are shares of the figure as it is made.

    Where the key has many rows, the figure grows by them.
    """
    widest = max((len(name) for name in names), default=0)
    columns = max(1, min(len(names), int(figure.get_figwidth() * 13 // (widest + 8))))
    rows = -(-len(names) // columns)
    if names:
        # A label that begins with an underscore would be left out, so labels are set afterwards.
        legend = figure.legend(handles, ["x" * len(name) for name in names], loc="upper left", ncols=columns)
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_text(name)
    made = figure.get_figheight()
    grown = _KEY_ROW_INCHES * max(0, rows - _KEY_ROWS)
    height, above = made + grown, (1 - top) * made + 0.1 + 0.2 * min(rows, _KEY_ROWS) + grown
    figure.set_figheight(height)
    figure.subplots_adjust(left=left, right=right, bottom=bottom * made / height, top=1 - above / height, wspace=wspace)


def _short(value: float, _place: int | None = None) -> str:
    return f"{value:g}"


def _metric(results: Results) -> str:
    return label_of(f"held-out {results.metric.name} ({results.metric.unit})")


def _draw_curve(axes: Axes, curve: Curve, at: tuple[float, ...], colour: str, style: Any) -> Any:
    points = [i for i, x in enumerate(at) if x > 0 or axes.get_xscale() == "linear"]
    x = [at[i] for i in points]
    axes.fill_between(
        x, [curve.low[i] for i in points], [curve.high[i] for i in points], color=colour, alpha=0.16, linewidth=0
    )
    # A line of one point would not be seen.
    marker = "o" if len(points) == 1 else None
    return axes.plot(x, [curve.median[i] for i in points], color=colour, linestyle=style, marker=marker)[0]


def draw_curves(results: Results) -> Figure:
    """Draw the held-out metric against steps and against seconds: medians, bands over seeds, and the goals."""
    figure = Figure(figsize=(9.2, 4.4))
    panels: list[Axes] = list(figure.subplots(1, 2, sharey=True))
    drawn, look = curves(results), looks(results)
    handles: list[Any] = []
    names: list[str] = []
    for axes, unit in zip(panels, ("steps", "seconds"), strict=True):
        if unit == "steps":
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=20))
            axes.xaxis.set_major_formatter(FuncFormatter(_short))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("steps" if unit == "steps" else "seconds, calibration and conversion included")
        for curve in drawn:
            at = curve.steps if unit == "steps" else curve.seconds
            line = _draw_curve(axes, curve, at, LIGHT[look[curve.arm].colour], _STYLES[look[curve.arm].dash])
            if unit == "steps":
                handles.append(line)
                names.append(label_of(curve.arm))
        for goal in results.goals:
            for curve in (one for one in drawn if one.arm == goal):
                axes.axhline(curve.median[-1], color=LIGHT[look[goal].colour], linewidth=1, linestyle=(0, (4, 3)))
        if results.source:
            line = axes.axhline(results.source.test, color=_INK, linewidth=1, linestyle=(0, (1, 2)))
            if unit == "steps":
                handles.append(line)
                names.append("the source")
    panels[0].set_ylabel(_metric(results))
    if not drawn:
        panels[0].text(0.5, 0.5, "no run has finished", transform=panels[0].transAxes, ha="center", color=_MUTED)
    _lay_out(figure, handles, names, left=0.075, right=0.985, bottom=0.115, top=0.985, wspace=0.06)
    return figure


def draw_rates(results: Results) -> Figure:
    """Draw the last validation metric against the learning rate; trials hollow, diverged ones as crosses."""
    figure = Figure(figsize=(6.4, 4.2))
    axes, look, found = figure.add_subplot(), looks(results), trials(results)
    axes.set_xscale("log")
    handles: list[Any] = []
    names: list[str] = []
    values = [trial.value for trial in found if trial.value is not None]
    top = max(values, default=1.0) + 0.08 * max(max(values, default=1.0) - min(values, default=0.0), 1e-3)
    for arm in results.arms:
        mine = [trial for trial in found if trial.arm == arm.name]
        colour, style = LIGHT[look[arm.name].colour], _STYLES[look[arm.name].dash]
        ended = [(t.learning_rate, t.value) for t in mine if t.status == "finished" and t.value is not None]
        line = axes.plot([x for x, _ in ended], [y for _, y in ended], color=colour, linestyle=style)[0]
        for trial in mine:
            if trial.status == "diverged":
                axes.plot(trial.learning_rate, top, marker="x", color=colour, markersize=7)
            elif trial.value is not None:
                face = "none" if trial.status == "trial" else colour
                marker = "^" if trial.status == "trial" else "o"
                size = 8 if trial.best else 5
                axes.plot(
                    trial.learning_rate, trial.value, marker=marker, color=colour, markerfacecolor=face, markersize=size
                )
        if mine:
            handles.append(line)
            names.append(label_of(arm.name))
    axes.set_xlabel("learning rate (large: chosen; hollow: a shorter trial; cross: diverged)")
    axes.set_ylabel(label_of(f"last validation {results.metric.name} ({results.metric.unit})"))
    rates = sorted({trial.learning_rate for trial in found if trial.learning_rate > 0})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    _lay_out(figure, handles, names, left=0.115, right=0.98, bottom=0.12, top=0.98)
    return figure


def _draw_strip(axes: Axes, strip: Strip, colour: str) -> None:
    width = max((len(row) for row in strip.cells), default=0)
    cells = [[*row, *[0.0] * (width - len(row))] for row in strip.cells]
    shades = LinearSegmentedColormap.from_list("kept", [_EMPTY, colour])
    axes.imshow(cells, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if width <= _MOST_CELLS_WITH_EDGES:
        for edge in range(1, width):
            axes.axvline(edge - 0.5, color="white", linewidth=1)
    if len(cells) <= _MOST_CELLS_WITH_EDGES:
        for edge in range(1, len(cells)):
            axes.axhline(edge - 0.5, color="white", linewidth=1)


def draw_kept(results: Results) -> Figure:
    """Draw which layers, heads, neurons and directions every arm kept, an arm a column: light was dropped."""
    look = looks(results)
    found = [(arm.name, {one.title: one for one in strips(arm.plan)}) for arm in results.arms if arm.plan]
    found = [(name, mine) for name, mine in found if mine]
    bands = [found[i : i + _ARMS_A_BAND] for i in range(0, len(found), _ARMS_A_BAND)]
    titles = [list(dict.fromkeys(title for _, mine in band for title in mine)) for band in bands]
    rows = [
        [max(len(m[t].cells) for _, m in band if t in m) for t in all_]
        for band, all_ in zip(bands, titles, strict=True)
    ]
    heights = [[0.3 + min(1.2, 0.11 * max(1, count)) for count in counts] for counts in rows]
    total = sum(map(sum, heights)) + 0.42 * len(bands) or 1.0
    columns = max((len(band) for band in bands), default=1)
    figure = Figure(figsize=(max(4.0, 2.4 * columns), total))
    top = total
    for band, all_, tall in zip(bands, titles, heights, strict=True):
        top -= 0.3
        for column, (name, _) in enumerate(band):
            figure.text((column + 0.04) / columns, top / total, label_of(name)[:28], fontsize=9, va="bottom")
        for title, height in zip(all_, tall, strict=True):
            top -= height
            for column, (name, mine) in enumerate(band):
                if title in mine:
                    place = ((column + 0.04) / columns, top / total, 0.92 / columns, (height - 0.22) / total)
                    axes = figure.add_axes(place)
                    _draw_strip(axes, mine[title], LIGHT[look[name].colour])
                    said = f"{label_of(title).partition(':')[0]}: {mine[title].summary}"
                    axes.set_title(said[:44], loc="left", fontsize=6.5, pad=3, color=_MUTED)
        top -= 0.12
    if not found:
        figure.text(0.5, 0.5, "no plan says what it kept", ha="center", va="center", color=_MUTED)
    return figure


DRAWINGS: dict[str, Callable[[Results], Figure]] = {"curves": draw_curves, "rates": draw_rates, "kept": draw_kept}


def _bytes_of(figure: Figure, kind: str) -> bytes:
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    stream = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(stream, format=kind, metadata=metadata)
    return stream.getvalue()


def draw(results: Results) -> dict[str, bytes]:
    """Return every figure under its file name, as PNG and as SVG. The same results give the same bytes."""
    with _styled():
        return {
            f"{name}.{kind}": _bytes_of(drawing(results), kind)
            for name, drawing in DRAWINGS.items()
            for kind in ("png", "svg")
        }
