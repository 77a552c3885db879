"""Which layers, heads, neurons and directions a plan kept, as rows of cells that any picture can show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from anysize.report.schema import Kept, PlanRecord

MAX_CELLS = 256
_NOUNS = {
    "hidden": "coordinates of the stream",
    "ffn": "neurons",
    "kv": "kv heads",
    "group": "query heads of a group",
    "head": "channels of a head",
    "expert": "experts",
    "vocab": "tokens",
}


@dataclass(frozen=True)
class Strip:
    """One picture: `cells[row][column]` from 0 (dropped) to 1 (kept). A cell stands for `width` coordinates.

    Where coordinates are kept more than once, 1 is the most copies of any.
    """

    title: str
    summary: str
    rows: tuple[str, ...]
    cells: tuple[tuple[float, ...], ...]
    width: int
    kind: str


def _counts(kept: Iterable[int], size: int, width: int) -> list[int]:
    times = Counter(index // width for index in kept if 0 <= index < size)
    return [times[cell] for cell in range(-(-size // width))]


def _scaled(rows: list[list[int]], width: int, size: int) -> tuple[tuple[float, ...], ...]:
    full = [min(width, size - cell * width) for cell in range(-(-size // width))]
    shares = [[count / most for count, most in zip(row, full, strict=True)] for row in rows]
    top = max([1.0, *(share for row in shares for share in row)])
    return tuple(tuple(round(share / top, 4) for share in row) for row in shares)


def _layers(plan: PlanRecord) -> Strip:
    size = max(plan.num_source_layers, *(layer + 1 for layer in plan.layers))
    distinct = len(set(plan.layers))
    summary = f"{distinct} of {size} kept"
    if len(plan.layers) != distinct:
        summary = f"{distinct} of {size} used for {len(plan.layers)}"
    width = max(1, -(-size // MAX_CELLS))
    return Strip(
        "layers", summary, ("",), _scaled([_counts(set(plan.layers), size, width)], width, size), width, "layer"
    )


def _axis(kept: Kept) -> Strip:
    width = max(1, -(-kept.source_size // MAX_CELLS))
    sizes = sorted({len(set(row)) for row in kept.rows.values()})
    count = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    everywhere = "" if len(kept.rows) == 1 else " each"
    return Strip(
        title=f"{kept.axis}: {_NOUNS[kept.axis]}" if kept.axis in _NOUNS else kept.axis,
        summary=f"{count} of {kept.source_size:,} kept{everywhere}",
        rows=tuple(kept.rows),
        cells=_scaled([_counts(row, kept.source_size, width) for row in kept.rows.values()], width, kept.source_size),
        width=width,
        kind=kept.axis,
    )


def _directions(plan: PlanRecord) -> Strip:
    top = max([1e-12, *(share for row in plan.directions for share in row)])
    return Strip(
        title="directions: how the stream was turned",
        summary="rows: those kept, columns: the stream",
        rows=tuple(str(row) for row in range(len(plan.directions))),
        cells=tuple(tuple(round(max(0.0, share) / top, 4) for share in row) for row in plan.directions),
        width=1,
        kind="direction",
    )


def strips(plan: PlanRecord) -> list[Strip]:
    """Return the pictures of a plan: layers, each axis that was cut, and directions; none where it says nothing."""
    found = [_layers(plan)] if plan.layers else []
    found += [_axis(kept) for kept in plan.kept if kept.rows and kept.source_size > 0]
    if plan.directions and any(plan.directions):
        found.append(_directions(plan))
    return found
