"""Layer plans: for each target layer, the source layer it comes from and whether its branches start silent."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from anysize.errors import SizeError

GROWN = ("identity", "interpose", "stack")
CUT = ("middle", "first", "uniform")
# It takes a run of the source for every layer, so that it is measured only when it is asked for.
LEAVE_ONE_OUT = "leave-one-out"
# How layers are dropped by score -> the scores of that kind. Sources: 2403.03853, 2312.09299, 2403.17887, 2406.16286.
SCORED = {
    "block-influence": "influence",
    "relative-magnitude": "magnitude",
    "angular": "angular",
    LEAVE_ONE_OUT: "leave-one-out",
}
# Which layers go is searched for by running the source: see calibration.evolution.
EVOLUTIONARY = "evolutionary"
PATTERNS = (*GROWN, *CUT, *SCORED, EVOLUTIONARY)
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


class LayerStep(BaseModel):
    """One target layer: a copy of source layer `source`, its residual branches zeroed when `silent`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: int
    silent: bool = False


def _explicit(text: str, source_size: int) -> list[int]:
    layers: list[int] = []
    for piece in text.split(","):
        match = _SPAN.fullmatch(piece.strip())
        if match is None:
            raise SizeError(
                f"layers '{text}': '{piece.strip()}' is neither {', '.join(PATTERNS)} nor a list such as 0-3,2-5"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= source_size:
            raise SizeError(f"layers '{text}': '{piece.strip()}' does not lie in 0-{source_size - 1}")
        layers.extend(range(first, last + 1))
    return layers


def listed_depth(pattern: str, source_size: int) -> int | None:
    """Return how many layers an explicit list makes; None for a pattern, which leaves that open. Raises SizeError."""
    return None if pattern in ("auto", *PATTERNS) else len(_explicit(pattern, source_size))


def _cut(source_size: int, target_size: int, pattern: str) -> list[int]:
    """Return the layers that are kept where no score is needed."""
    if pattern == "first":
        return list(range(target_size))
    if pattern == "uniform":
        last = max(1, target_size - 1)
        return [(2 * i * (source_size - 1) + last) // (2 * last) for i in range(target_size)]
    dropped = source_size - target_size
    first = target_size // 2
    return [*range(first), *range(first + dropped, source_size)]


def _scored(target_size: int, pattern: str, scores: Sequence[Any]) -> list[int]:
    """Return the layers that are kept by score: low scores go, of equal ones the first."""
    if pattern == "angular":
        size = len(scores) - 1
        span = size - target_size
        first = min(range(target_size + 1), key=lambda layer: float(scores[layer][layer + span]))
        return [*range(first), *range(first + span, size)]
    worst = sorted(range(len(scores)), key=lambda layer: float(scores[layer]))[: len(scores) - target_size]
    return sorted(set(range(len(scores))) - set(worst))


def layer_plan(
    source_size: int, target_size: int, pattern: str, scores: Mapping[str, Sequence[Any]] | None = None
) -> tuple[LayerStep, ...]:
    """Return one step for every target layer.

    To add: "identity" interposes copies whose branches are zero (l1 l1° l2 l2°, exact), "interpose" repeats each layer
    (l1 l1 l2 l2), "stack" repeats the whole stack (l1..ln l1..ln). To drop: "middle" (2312.09299), "first"
    (2311.18823), "uniform", or by `scores` (kind -> one score a layer): "block-influence", "relative-magnitude",
    "angular", "leave-one-out". Or an explicit list "0-3,2-5", which is also what "evolutionary" ends in. Raises
    SizeError.
    Source: methods LLaMA-Pro (2401.02415), interposition (2510.08008), G_stack (2405.15319).
    """
    if pattern not in PATTERNS:
        layers = _explicit(pattern, source_size)
        if len(layers) != target_size:
            raise SizeError(f"layers '{pattern}' lists {len(layers)} layers, but num_hidden_layers is {target_size}")
        return tuple(LayerStep(source=layer) for layer in layers)
    if target_size == source_size:
        return tuple(LayerStep(source=layer) for layer in range(source_size))
    change = f"num_hidden_layers {source_size} -> {target_size}"
    if target_size < source_size:
        if pattern in GROWN:
            drops = ", ".join((*CUT, *SCORED, EVOLUTIONARY))
            raise SizeError(f"{change}: '{pattern}' adds layers; to drop some: {drops}, or a list")
        if pattern in CUT:
            kept = _cut(source_size, target_size, pattern)
        elif pattern == EVOLUTIONARY:
            raise SizeError(f"{change}: '{pattern}' runs the source on data: pass --calibration, or choose middle")
        elif scores is None or SCORED[pattern] not in scores:
            # Where data are calibrated on for this plan they are measured; a scores file may have been made without.
            lacking = scores is not None and pattern == LEAVE_ONE_OUT
            how = "calibrate with --leave-one-out" if lacking else "pass --calibration"
            raise SizeError(f"{change}: '{pattern}' needs the layers' scores: {how}, or choose middle")
        else:
            kept = _scored(target_size, pattern, scores[SCORED[pattern]])
        return tuple(LayerStep(source=layer) for layer in kept)
    if pattern not in GROWN:
        raise SizeError(f"{change}: '{pattern}' drops layers; to add some: {', '.join(GROWN)}, or a list")
    if pattern == "stack":
        return tuple(LayerStep(source=layer % source_size) for layer in range(target_size))
    sources = [layer * source_size // target_size for layer in range(target_size)]
    repeated = [i > 0 and sources[i] == sources[i - 1] for i in range(target_size)]
    return tuple(
        LayerStep(source=source, silent=pattern == "identity" and again)
        for source, again in zip(sources, repeated, strict=True)
    )
