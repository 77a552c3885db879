"""DimMap: what the axis maps of a plan do to one dim of one stored tensor, composed and flattened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from anysize.axis import NEW, AxisMap, Index, keep
from anysize.notation import Block, Dim, Factor


class Fill(IntEnum):
    """What stands at a coordinate of a stored tensor: a copy, or how the new capacity is filled there."""

    COPY = 0
    ZERO = 1
    FRESH = 2
    MEAN = 3
    ONE = 4


# Where the new coordinates of an axis are silent. `hidden` is silent at its writers, so its readers are free and
# get gradient through the fresh values; `ffn`, `kv`, `group` and `head` are silent at their readers. A new
# query/key channel is silent in the dot product because the key is zero. A token's row is the mean of the old.
_WRITE_FILL = {"vocab": Fill.MEAN, "key(head)": Fill.ZERO}
_READ_FILL = {"hidden": Fill.FRESH, "norm(hidden)": Fill.FRESH, "vocab": Fill.MEAN}


@dataclass(frozen=True)
class CopyGroup:
    """Source coordinates with equally many copies: `sources` [s] and, for each copy, the `targets` [k, s]."""

    sources: Index
    targets: Index

    @property
    def num_copies(self) -> int:
        return int(self.targets.shape[0])


@dataclass(frozen=True)
class DimMap:
    """One dim of one tensor: flat source index, fill and factor of every target coordinate.

    index: int64 [m], NEW where nothing is copied; fill: uint8 [m]; factor: float64 [m], 1 but for
    query/key channels; ordinal: int64 [m], which copy of its source coordinate this one is.
    """

    source_size: int
    index: Index
    fill: NDArray[np.uint8]
    factor: NDArray[np.float64]

    @property
    def target_size(self) -> int:
        return int(self.index.size)

    @property
    def is_identity(self) -> bool:
        same = self.target_size == self.source_size and bool((self.index == np.arange(self.source_size)).all())
        return same and bool((self.factor == 1).all())

    @property
    def ordinal(self) -> Index:
        """int64 [m]: 0 for the first copy of a source coordinate, 1 for the second, …; new coordinates are 0."""
        order = np.argsort(self.index, kind="stable")
        sorted_index = self.index[order]
        first = np.searchsorted(sorted_index, sorted_index, side="left")
        ordinal = np.empty(self.target_size, np.int64)
        ordinal[order] = np.arange(self.target_size) - first
        ordinal[self.index == NEW] = 0
        return ordinal

    @property
    def groups(self) -> tuple[CopyGroup, ...]:
        """The copied coordinates, grouped by how many copies they have; every copy is in exactly one group."""
        counts = np.bincount(self.index[self.index != NEW], minlength=self.source_size)
        order = np.argsort(self.index, kind="stable")[np.count_nonzero(self.index == NEW) :]
        begins = np.concatenate(([0], np.cumsum(counts)))
        found: list[CopyGroup] = []
        for copies in np.unique(counts[counts > 0]):
            sources = np.flatnonzero(counts == copies)
            targets = np.stack([order[begins[sources] + t] for t in range(int(copies))])
            found.append(CopyGroup(sources, targets))
        return tuple(found)


def _fill_of(factor: Factor, *, writes: bool, pad: Fill) -> Fill:
    name = str(factor)
    if writes:
        return pad if factor.axis == "hidden" else _WRITE_FILL.get(name, Fill.FRESH)
    if name == "hidden" and pad == Fill.MEAN:
        # Before a norm has taken it out, a pad that holds the mean is not silent: its readers have to be.
        return Fill.ZERO
    return _READ_FILL.get(name, Fill.ZERO)


def _factor_of(factor: Factor, axis_map: AxisMap, score_power: float) -> NDArray[np.float64]:
    """Return per-channel factors that keep q . k / sqrt(head) when the head is widened.

    A source channel with c copies contributes c * s^2 * q_i * k_i, divided by sqrt(d') (or by a fixed scale):
    so s = c^-1/2 * (d'/d)^score_power, with score_power 1/4, or 0 where the config fixes the scale.
    """
    if factor.role not in ("query", "key") or axis_map.is_identity:
        return np.ones(axis_map.target_size)
    copies = np.where(axis_map.index == NEW, 1, axis_map.multiplicity[axis_map.index])
    return copies**-0.5 * (axis_map.target_size / axis_map.source_size) ** score_power


def _compose(block: Block, axes: Mapping[str, AxisMap], *, writes: bool, pad: Fill, score_power: float) -> DimMap:
    index, source_size = np.zeros(1, np.int64), 1
    fill, scale = np.zeros(1, np.uint8), np.ones(1)
    for factor in block.factors:
        fixed = factor.fixed
        axis_map = keep(fixed) if fixed is not None else axes[factor.axis]
        inner_fill = np.where(axis_map.index == NEW, _fill_of(factor, writes=writes, pad=pad), Fill.COPY)
        outer, inner = index[:, None], axis_map.index[None, :]
        flat = np.where((outer == NEW) | (inner == NEW), NEW, outer * axis_map.source_size + inner)
        # The outermost new axis decides: inside a new head nothing is inherited, whatever its channels are.
        fill = np.where(fill[:, None] != Fill.COPY, fill[:, None], inner_fill[None, :]).astype(np.uint8).ravel()
        scale = (scale[:, None] * _factor_of(factor, axis_map, score_power)[None, :]).ravel()
        index, source_size = flat.ravel(), source_size * axis_map.source_size
    return DimMap(source_size, index, fill, scale)


def compose(
    dim: Dim, axes: Mapping[str, AxisMap], *, writes: bool, pad: Fill = Fill.ZERO, score_power: float = 0.25
) -> DimMap:
    """Return the map of one tensor dim from the maps of the axes in it.

    `writes` says whether the tensor writes the dim or reads it; `pad` is what writers put into new coordinates of
    `hidden` (zero, or the mean under LayerNorm). Raises KeyError for an axis that the plan has no map for.
    """
    parts = [_compose(block, axes, writes=writes, pad=pad, score_power=score_power) for block in dim.blocks]
    offsets = np.cumsum([0, *(part.source_size for part in parts)])
    index = [
        np.where(part.index == NEW, NEW, part.index + offset) for part, offset in zip(parts, offsets, strict=False)
    ]
    return DimMap(
        int(offsets[-1]),
        np.concatenate(index),
        np.concatenate([part.fill for part in parts]),
        np.concatenate([part.factor for part in parts]),
    )
