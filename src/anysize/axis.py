"""AxisMap: how one axis of n coordinates becomes m, as a pair of linear maps with S . R = I.

    write  R : n -> m     what a layer that produces the axis now produces
    read   S : m -> n     what a layer that consumes the axis does with it

A map is stored as runs of source coordinates; a run that starts at -1 is new capacity, which no source
coordinate fills. This module knows nothing of tensors, families or presets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, model_validator

NEW = -1
Index = NDArray[np.int64]


def runs_of(index: Iterable[int] | Index) -> tuple[tuple[int, int], ...]:
    """Compress an index array into runs (start, length); NEW starts a run of new coordinates."""
    array = np.asarray(index if isinstance(index, np.ndarray) else list(index), dtype=np.int64)
    if array.size == 0:
        return ()
    new = array == NEW
    continues = np.where(new[1:], new[:-1], ~new[:-1] & (np.diff(array) == 1))
    starts = np.concatenate(([0], np.flatnonzero(~continues) + 1, [array.size]))
    return tuple((int(array[a]), int(b - a)) for a, b in itertools.pairwise(starts))


class AxisMap(BaseModel):
    """Which source coordinate each target coordinate copies, or none: a gather that every reader can undo.

    `source_size` is n; the lengths of `runs` add up to m. Raises pydantic's ValidationError for a run outside
    the source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    source_size: int
    runs: tuple[tuple[int, int], ...]

    @model_validator(mode="after")
    def _runs_lie_in_the_source(self) -> AxisMap:
        for start, length in self.runs:
            if length < 1 or start < NEW or (start != NEW and start + length > self.source_size):
                raise ValueError(f"run ({start}, {length}) does not lie in a source of {self.source_size}")
        return self

    def __eq__(self, other: object) -> bool:
        # By what is stored; what has been computed from it does not count.
        return isinstance(other, AxisMap) and (self.source_size, self.runs) == (other.source_size, other.runs)

    def __hash__(self) -> int:
        return hash((self.source_size, self.runs))

    @cached_property
    def target_size(self) -> int:
        return sum(length for _, length in self.runs)

    @cached_property
    def index(self) -> Index:
        """int64 [m]: the source coordinate of each target coordinate, NEW where there is none."""
        parts = [
            np.full(length, NEW, np.int64) if start == NEW else np.arange(start, start + length)
            for start, length in self.runs
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    @cached_property
    def multiplicity(self) -> Index:
        """int64 [n]: how many target coordinates copy each source coordinate."""
        return np.bincount(self.index[self.index != NEW], minlength=self.source_size)

    @property
    def num_new(self) -> int:
        return int(np.count_nonzero(self.index == NEW))

    @property
    def is_identity(self) -> bool:
        return self.runs == ((0, self.source_size),)

    @property
    def has_left_inverse(self) -> bool:
        """Whether some S with S . R = I exists: every source coordinate survives at least once."""
        return bool(self.multiplicity.min() > 0)

    @property
    def is_uniform(self) -> bool:
        """Whether every source coordinate has equally many copies, as statistics over the axis demand."""
        return bool((self.multiplicity == self.multiplicity[0]).all())

    def then(self, later: AxisMap) -> AxisMap:
        """Return the map that applies `self` first and `later` to its result."""
        if later.source_size != self.target_size:
            raise ValueError(f"cannot compose: {self.target_size} coordinates meet a map of {later.source_size}")
        index = np.where(later.index == NEW, NEW, self.index[later.index])
        return AxisMap(source_size=self.source_size, runs=runs_of(index))

    def write_matrix(self) -> NDArray[np.float64]:
        """Return R, float64 [m, n]; zero rows for new coordinates."""
        matrix = np.zeros((self.target_size, self.source_size))
        old = np.flatnonzero(self.index != NEW)
        matrix[old, self.index[old]] = 1.0
        return matrix

    def read_matrix(self) -> NDArray[np.float64]:
        """Return the equal-share S, float64 [n, m]: each copy of a coordinate carries the same share."""
        shares = np.divide(1.0, self.multiplicity, where=self.multiplicity > 0, out=np.zeros(self.source_size))
        return self.write_matrix().T * shares[:, None]


def own_place(
    axes: Mapping[str, AxisMap], names: Iterable[str], layer: int | None, expert: int | None
) -> tuple[int | None, int | None]:
    """Return the (layer, expert) that have maps of their own ("ffn.3", "ffn.3.5") for one of these axes, else None."""
    names = tuple(names)
    if any(f"{name}.{layer}.{expert}" in axes for name in names):
        return layer, expert
    return (layer if any(f"{name}.{layer}" in axes for name in names) else None), None


class AxesAt(Mapping[str, AxisMap]):
    """One map an axis at one place: the expert's own ("ffn.3.5"), else the layer's ("ffn.3"), else the common one."""

    def __init__(self, axes: Mapping[str, AxisMap], layer: int | None, expert: int | None = None) -> None:
        self._axes, self._suffixes = axes, (f".{layer}.{expert}", f".{layer}", "")

    def __getitem__(self, name: str) -> AxisMap:
        for suffix in self._suffixes:
            if (found := self._axes.get(f"{name}{suffix}")) is not None:
                return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._axes if "." not in name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def keep(size: int) -> AxisMap:
    """Return the identity on `size` coordinates."""
    return AxisMap(source_size=size, runs=((0, size),))


def tile(source_size: int, target_size: int) -> AxisMap:
    """Return whole copies one after the other, then the first coordinates again for what remains."""
    whole, rest = divmod(target_size, source_size)
    runs = ((0, source_size),) * whole + (((0, rest),) if rest else ())
    return AxisMap(source_size=source_size, runs=runs)


def extend(source_size: int, target_size: int, *, copies: int = 1) -> AxisMap:
    """Return `copies` whole copies, then new coordinates for what remains."""
    new = target_size - copies * source_size
    if new < 0:
        raise ValueError(f"{copies} copies of {source_size} do not fit into {target_size}")
    runs = ((0, source_size),) * copies + (((NEW, new),) if new else ())
    return AxisMap(source_size=source_size, runs=runs)


def select(source_size: int, index: Iterable[int]) -> AxisMap:
    """Return the map whose target coordinate j copies source coordinate index[j] (gather, permutation, subset)."""
    return AxisMap(source_size=source_size, runs=runs_of(index))
