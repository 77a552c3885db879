"""Layer plans: for each target layer, the source layer it comes from and whether its branches start silent."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict

from anysize.errors import SizeError

PATTERNS = ("identity", "interpose", "stack")
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


def layer_plan(source_size: int, target_size: int, pattern: str) -> tuple[LayerStep, ...]:
    """Return one step for every target layer.

    `pattern`: "identity" interposes copies whose branches are zero (l1 l1° l2 l2°, exact), "interpose" repeats each
    layer (l1 l1 l2 l2), "stack" repeats the whole stack (l1..ln l1..ln), or an explicit list "0-3,2-5". Raises
    SizeError.
    Source: methods LLaMA-Pro (2401.02415), interposition (2510.08008), G_stack (2405.15319).
    """
    if pattern not in PATTERNS:
        layers = _explicit(pattern, source_size)
        if len(layers) != target_size:
            raise SizeError(f"layers '{pattern}' lists {len(layers)} layers, but num_hidden_layers is {target_size}")
        return tuple(LayerStep(source=layer) for layer in layers)
    if target_size < source_size:
        raise SizeError(
            f"num_hidden_layers {target_size} is below the source's {source_size}: list the layers to keep "
            f"(for example 0-{target_size - 1})"
        )
    if pattern == "stack":
        return tuple(LayerStep(source=layer % source_size) for layer in range(target_size))
    sources = [layer * source_size // target_size for layer in range(target_size)]
    repeated = [i > 0 and sources[i] == sources[i - 1] for i in range(target_size)]
    return tuple(
        LayerStep(source=source, silent=pattern == "identity" and again)
        for source, again in zip(sources, repeated, strict=True)
    )
