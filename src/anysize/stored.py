"""StoredArrays: named arrays that lie in files and are read one at a time, so that together they may exceed the memory.

Nothing is mapped, because mapped pages count as resident. This module knows nothing of torch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anysize.errors import CheckpointError
from anysize.io.whole import told_of_disk

Matrix = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Place:
    """Where one array lies: first byte in the file, type, shape."""

    begin: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class _File:
    """A file that stays open as long as something refers to it: another one under its name changes nothing."""

    def __init__(self, path: Path, *, scratch: bool = False) -> None:
        """Open a file to read, or, in a folder, a scratch one without a name that goes when it is closed."""
        self.name = str(path)
        if scratch:
            with tempfile.TemporaryFile(dir=path) as made:
                self.number = os.dup(made.fileno())
        else:
            self.number = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.number)

    def changed(self) -> tuple[int, int]:
        """Return what is different once somebody wrote into the file."""
        found = os.fstat(self.number)
        return found.st_size, found.st_mtime_ns

    def read(self, buffer: memoryview, begin: int) -> int:
        """Fill the buffer from a place on; return how many bytes there were."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.number, [buffer[done:]], begin + done)
            if count == 0:
                break
            done += count
        return done


class StoredArrays(Mapping[str, Matrix]):
    """Arrays in one file, each read when it is asked for; raises CheckpointError where the file was written into.

    digests: the SHA-256 of arrays, by name; one that has another when it is first read is refused in the same way.
    """

    def __init__(self, path: Path, places: Mapping[str, Place], digests: Mapping[str, str] | None = None) -> None:
        """Open a file; raise CheckpointError where it cannot be."""
        self.places, self._unchecked = dict(places), dict(digests or {})
        try:
            self._file = _File(path)
        except OSError as error:
            raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
        self._opened: tuple[int, int] | None = self._file.changed()

    def __getitem__(self, name: str) -> Matrix:
        place = self.places[name]
        found = np.empty(place.num_bytes, np.uint8)
        if self._opened is not None and self._file.changed() != self._opened:
            raise CheckpointError(f"'{self._file.name}' changed since it was opened: load it again")
        done = self._file.read(found.data, place.begin)
        assert done == place.num_bytes, "a header was checked against the size of its file"
        if name in self._unchecked:
            if hashlib.sha256(found.data).hexdigest() != self._unchecked[name]:
                raise CheckpointError(
                    f"'{self._file.name}' is damaged: its {name!r} is not what was written; make it anew"
                )
            del self._unchecked[name]
        return found.view(place.dtype).reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class ScratchArrays(StoredArrays, MutableMapping[str, Matrix]):
    """Arrays that are put into a file without a name, which goes when nothing refers to it any more, or with a kill.

    What is replaced stays in the file, for whoever holds what was there before.
    """

    def __init__(self, folder: Path | None = None, what: str = "what is fitted") -> None:
        """Make the file in a folder, or in TMPDIR; raise OutputError that says what cannot be kept, here and later."""
        self._what, self._fix = what, "set TMPDIR to a folder with room" if folder is None else ""
        folder = Path(tempfile.gettempdir()) if folder is None else folder
        with self._keeping(str(folder)):
            self.places, self._unchecked, self._file, self._opened = {}, {}, _File(folder, scratch=True), None
        self._end = 0

    def _keeping(self, folder: str) -> AbstractContextManager[None]:
        return told_of_disk(f"cannot keep {self._what} in '{folder}'", self._fix)

    def frozen(self) -> StoredArrays:
        """Return the arrays as they are now, whatever is put here later."""
        found = ScratchArrays.__new__(StoredArrays)
        found.places, found._unchecked, found._file, found._opened = dict(self.places), {}, self._file, None
        return found

    def __setitem__(self, name: str, values: Matrix) -> None:
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
        done = 0
        with self._keeping(self._file.name):
            while done < len(data):
                done += os.pwrite(self._file.number, data[done:], self._end + done)
        self.places[name] = Place(self._end, values.dtype, values.shape)
        self._end += done

    def __delitem__(self, name: str) -> None:
        del self.places[name]
