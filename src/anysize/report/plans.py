"""Plans as tables: every kind of tensor with its arrow, its shapes and how it is made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from anysize.recipe import Plan, Recipe


def how_made(recipe: Recipe) -> str:
    """Return in a few words how a tensor is made."""
    if recipe.silent:
        return "zero: the layer starts as an identity"
    if recipe.value:
        return "fitted to the calibration data"
    parts: list[str] = []
    if recipe.writer:
        parts.append("turned to the kept directions")
    if recipe.reader:
        parts.append("least-squares readers")
    if recipe.share != "none":
        parts.append(f"{recipe.share} shares")
    if recipe.noise_db is not None:
        parts.append(f"+- noise at {recipe.noise_db:g} dB")
    if abs(recipe.factor - 1) > 1e-12:
        parts.append(f"x {recipe.factor:.4g}")
    if prod(recipe.shape) < prod(recipe.source_shape) and not recipe.reader and not recipe.writer:
        parts.insert(0, "select")
    return ", ".join(parts) or ("copy" if recipe.shape == recipe.source_shape else "copy and extend")


def shown_shape(shape: Sequence[int]) -> str:
    """Return a shape as a person writes it."""
    return " x ".join(map(str, shape))


def plan_rows(plan: Plan) -> list[tuple[str, str, str, str, str, int]]:
    """Return (tensor, reads -> writes, source shape, target shape, how, count), layers and experts taken together."""
    grouped: dict[tuple[str, str, str, str, str], int] = {}
    for recipe in plan.recipes:
        pattern = re.sub(r"\.\d+\.", ".{layer}.", recipe.name, count=1)
        pattern = re.sub(r"\.\d+\.", ".{expert}.", pattern)
        arrow = recipe.arrow.partition(",")[0]
        key = (pattern, arrow, shown_shape(recipe.source_shape), shown_shape(recipe.shape), how_made(recipe))
        grouped[key] = grouped.get(key, 0) + 1
    return [(*key, count) for key, count in grouped.items()]
