"""The page: one HTML file that holds its data, its styles, its scripts and plotly.js, and never asks the network."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from math import isfinite
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from anysize import __version__
from anysize.report import palette
from anysize.report.curves import curves, missing, trials
from anysize.report.headline import headline, number
from anysize.report.schema import Results
from anysize.report.strips import strips
from anysize.report.tables import costs, rates, summary


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _strips_of(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return the pictures of every arm, by its place among the arms."""
    return {
        str(place): [
            {
                "title": strip.title,
                "summary": strip.summary,
                "rows": strip.rows,
                "cells": strip.cells,
                "width": strip.width,
                "kind": strip.kind,
            }
            for strip in strips(arm.plan)
        ]
        for place, arm in enumerate(results.arms)
        if arm.plan
    }


def page_data(results: Results) -> dict[str, Any]:
    """Return what the scripts of the page draw, as plain JSON values without NaN."""
    look = palette.looks(results)
    after = {row.arm: row.after for row in results.rows}
    return {
        "metric": results.metric.model_dump(),
        "counted": results.counted,
        "arms": [
            {"name": arm.name, "colour": look[arm.name].colour, "dash": look[arm.name].dash} for arm in results.arms
        ],
        "curves": [
            {
                "arm": curve.arm,
                "rate": curve.learning_rate,
                "seeds": curve.num_seeds,
                "steps": curve.steps,
                "tokens": curve.tokens,
                "seconds": curve.seconds,
                "median": curve.median,
                "low": curve.low,
                "high": curve.high,
            }
            for curve in curves(results)
        ],
        "goals": [
            {"arm": goal, "value": value} for goal in results.goals if (value := _finite(after.get(goal))) is not None
        ],
        "source": _finite(results.source.test) if results.source else None,
        "trials": [
            {
                "arm": trial.arm,
                "rate": trial.learning_rate,
                "status": trial.status,
                "value": _finite(trial.value),
                "steps": trial.steps,
                "best": trial.best,
            }
            for trial in trials(results)
        ],
        "strips": _strips_of(results),
    }


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


@cache
def _environment() -> Environment:
    loader = PackageLoader("anysize.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@cache
def _plotly() -> tuple[str, str]:
    """Return the hash of plotly.js, and itself packed: half its size in the page, and every browser can unpack it."""
    script = get_plotlyjs()
    return _hash(script), base64.b64encode(gzip.compress(script.encode(), 9, mtime=0)).decode()


def _embedded(value: object) -> Markup:
    """Return a value as JSON that stands safely inside a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _policy(*hashes: str) -> Markup:
    """Return a policy under which only these scripts run and nothing is fetched, whatever the results contain."""
    return Markup(f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; img-src data:")


def _said(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _pairs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    return [(key, _said(value)) for key, value in values.items() if value is not None]


def render(results: Results, *, pictures: Mapping[str, bytes] | None = None) -> str:
    """Return the page of a comparison as one HTML document.

    pictures: the SVG figures by file name (see `plots.draw`), shown where scripts do not run. The same results give the
    same page. All text of the results is escaped, and the page's policy lets no other script run than its own.
    """
    environment = _environment()
    plotly, packed = _plotly()
    starter = environment.get_template("theme.js").render().strip()
    script = environment.get_template("report.js").render().strip()
    look = palette.looks(results)
    found = environment.get_template("report.html").render(
        results=results,
        headline=headline(results),
        missing=missing(results),
        summary=summary(results),
        rates=rates(results),
        costs=costs(results),
        number=number,
        pairs=_pairs,
        looks=look,
        strips={arm.name: bool(arm.plan and strips(arm.plan)) for arm in results.arms},
        drawn=bool(curves(results)),
        stills={name: base64.b64encode(data).decode() for name, data in (pictures or {}).items()},
        data=_embedded(page_data(results)),
        policy=_policy(_hash(starter), _hash(script), plotly),
        starter=Markup(starter),
        script=Markup(script),
        plotly=Markup(packed),
        version=__version__,
        palette=palette,
    )
    return found.replace("\x00", "\ufffd")
