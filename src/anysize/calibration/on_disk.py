"""What calibration found and leaves in files: statistics by site and kind, and streams, read as they are needed.

Files are read and never mapped: what is mapped counts as memory that is taken.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from anysize.calibration.statistics import MADE_OF, average, kinds_of
from anysize.io.whole import MOVE_SCRATCH, told_of_disk
from anysize.stored import StoredArrays

# What is told of the layers themselves lies beside the sites, under this name.
BLOCKS = "blocks"
# What a message says cannot be kept.
WHAT_IS_KEPT = "the sums of the calibration"


class OnDisk(Mapping[str, torch.Tensor]):
    """Statistics of one site by kind, float64, each read when it is asked for; what they are, without reading any."""

    @abstractmethod
    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Return the shape of one of them."""


class KindsOnDisk(OnDisk):
    """Statistics as they lie in a file, under these names."""

    def __init__(self, arrays: StoredArrays, names: Mapping[str, str]) -> None:
        self._arrays, self._names = arrays, names

    def __getitem__(self, kind: str) -> torch.Tensor:
        return torch.from_numpy(self._arrays[self._names[kind]]).double()

    def __contains__(self, kind: object) -> bool:
        return kind in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape_of(self, kind: str) -> tuple[int, ...]:
        return self._arrays.places[self._names[kind]].shape


class AveragesOnDisk(OnDisk):
    """The averages of a site whose sums lie in a file."""

    def __init__(self, sums: KindsOnDisk) -> None:
        self._sums, self._kinds = sums, kinds_of(sums.keys())

    def __getitem__(self, kind: str) -> torch.Tensor:
        if kind not in self._kinds:
            raise KeyError(kind)
        return average(kind, self._sums)

    def __contains__(self, kind: object) -> bool:
        return kind in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def __len__(self) -> int:
        return len(self._kinds)

    def shape_of(self, kind: str) -> tuple[int, ...]:
        return (1,) if kind == "samples" else self._sums.shape_of(MADE_OF[kind])


def by_site(arrays: StoredArrays) -> dict[str, KindsOnDisk]:
    """Return arrays named `site/kind` by site and kind, unread."""
    names: dict[str, dict[str, str]] = {}
    for name in arrays:
        site, _, kind = name.rpartition("/")
        names.setdefault(site, {})[kind] = name
    return {site: KindsOnDisk(arrays, kinds) for site, kinds in names.items()}


def keeping(folder: Path) -> AbstractContextManager[None]:
    """Return what tells, while active, that the disk refuses what a calibration keeps in this folder meanwhile."""
    temporary = folder.is_relative_to(tempfile.gettempdir())
    return told_of_disk(f"cannot keep {WHAT_IS_KEPT} in '{folder}'", MOVE_SCRATCH * temporary)


class RowsOnDisk:
    """Rows of float32 in a file, all of one shape, each written once and read at will; raises OutputError where the
    file cannot be written or read."""

    def __init__(self, path: Path) -> None:
        """Open a file, and make it where there is none."""
        self._path = path
        with keeping(path.parent):
            self._number = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._number)

    def write(self, first: int, rows: torch.Tensor) -> None:
        """Put rows [count, ...] there, from row `first` on."""
        data = rows.detach().float().cpu().contiguous().numpy().data.cast("B")
        begin, done = first * (len(data) // len(rows)), 0
        with keeping(self._path.parent):
            while done < len(data):
                done += os.pwrite(self._number, data[done:], begin + done)

    def sync(self) -> None:
        """Return once what was put there would outlast a power loss."""
        with keeping(self._path.parent):
            os.fsync(self._number)

    def read(self, first: int, count: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Return rows [count, *shape]."""
        found = torch.empty(count, *shape)
        data = found.numpy().data.cast("B")
        begin, done = first * (len(data) // count), 0
        with keeping(self._path.parent):
            while done < len(data):
                more = os.preadv(self._number, [data[done:]], begin + done)
                if more == 0:
                    raise OSError(f"'{self._path.name}' ended while it was read: it changed under us")
                done += more
        return found
