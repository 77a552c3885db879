"""DenseMaps: the matrices of a plan that are no gathers, named, hashed, and stored beside it as safetensors.

A reader S is [n, m]: what the source would have read, from what the target reads. A writer R is [m, n]. A value is a
target tensor that was fitted as a whole. This module knows nothing of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anysize.errors import CheckpointError
from anysize.io.tensor_file import save_one_by_one
from anysize.stored import Matrix, Place, ScratchArrays, StoredArrays

_TYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


class DenseMaps(Mapping[str, Matrix]):
    """An unchangeable set of named arrays, in memory or in a file; equal when their bytes are."""

    def __init__(self, arrays: Mapping[str, Matrix] | None = None) -> None:
        arrays = arrays or {}
        if isinstance(arrays, ScratchArrays):
            arrays = arrays.frozen()
        if not isinstance(arrays, StoredArrays):
            arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._arrays, self._names = arrays, sorted(arrays)
        self.sha256 = self._hash() if arrays else ""

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name in self._names:
            array = self._arrays[name]
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def __getitem__(self, name: str) -> Matrix:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def place(self, name: str) -> Place:
        """Return the type and shape of an array (and where it lies, if in a file) without reading it."""
        if isinstance(self._arrays, StoredArrays):
            return self._arrays.places[name]
        return Place(0, self._arrays[name].dtype, self._arrays[name].shape)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseMaps) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(self.place(name).num_bytes for name in self)

    @property
    def resident_bytes(self) -> int:
        """Bytes of all arrays in memory; of arrays in a file, of the largest."""
        sizes = [self.place(name).num_bytes for name in self]
        return max(sizes, default=0) if isinstance(self._arrays, StoredArrays) else sum(sizes)

    def save(self, path: Path) -> None:
        """Write the arrays as a safetensors file, at once under its name; raise OSError where that fails."""
        places = {name: self.place(name) for name in self}
        entries = ((name, _NAMES[at.dtype], at.shape, at.num_bytes) for name, at in places.items())
        save_one_by_one(path, entries, lambda name: self[name].data)

    @classmethod
    def load(cls, path: Path, sha256: str) -> DenseMaps:
        """Open the matrices of a plan, which stay in their file.

        Raises CheckpointError where they are missing or are another plan's.
        """
        try:
            found = cls(stored_arrays(path))
        except (OSError, CheckpointError) as error:
            raise CheckpointError(f"cannot read the plan's matrices '{path}': {error}") from error
        if found.sha256 != sha256:
            raise CheckpointError(f"'{path}' does not hold the matrices of this plan: their hash differs; plan again")
        return found


def stored_arrays(path: Path, digests: Mapping[str, str] | None = None) -> StoredArrays:
    """Return the floating-point arrays of a safetensors file, unread; raise CheckpointError where it is none.

    digests: see `StoredArrays`.
    """
    from anysize.io.reader import read_header  # noqa: PLC0415 - it reads configs, which plans are made of

    found = read_header(path)
    if other := sorted({info.dtype for info in found.values()} - _TYPES.keys()):
        raise CheckpointError(f"'{path}' holds {', '.join(other)}, wanted {', '.join(_TYPES)}")
    return StoredArrays(path, {n: Place(i.begin, _TYPES[i.dtype], i.shape) for n, i in found.items()}, digests)


def beside(plan: Path) -> Path:
    """Return where the matrices of a plan file lie: `plan.json` -> `plan.safetensors`."""
    return plan.with_suffix(".safetensors")


@dataclass
class Fitted:
    """Dense maps by name, and what they change in the recipes: target tensor -> fields."""

    dense: MutableMapping[str, Matrix] = field(default_factory=dict[str, Matrix])
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, tensor: str, **changes: Any) -> None:
        """Change fields of one target tensor's recipe."""
        self.fields.setdefault(tensor, {}).update(changes)

    def store(self, name: str, values: Matrix) -> str:
        """Keep an array in single precision and return its name."""
        self.dense[name] = np.ascontiguousarray(values, dtype=np.float32)
        return name
