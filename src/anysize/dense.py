"""DenseMaps: the matrices of a plan that are no gathers, named, hashed, and stored beside it as safetensors.

A reader S is [n, m]: what the source would have read, from what the target reads. A writer R is [m, n]. A value is a
target tensor that was fitted as a whole. This module knows nothing of torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anysize.errors import CheckpointError, OutputError

Matrix = NDArray[np.floating[Any]]


class DenseMaps(Mapping[str, Matrix]):
    """An unchangeable set of named arrays; equal when their bytes are."""

    def __init__(self, arrays: Mapping[str, Matrix] | None = None) -> None:
        self._arrays = {name: np.ascontiguousarray(a) for name, a in sorted((arrays or {}).items())}
        self.sha256 = self._hash() if self._arrays else ""

    def _hash(self) -> str:
        digest = hashlib.sha256()
        for name, array in self._arrays.items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def __getitem__(self, name: str) -> Matrix:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseMaps) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self._arrays.values())

    def save(self, path: Path) -> None:
        """Write the arrays as a safetensors file; raise OutputError where that fails."""
        from safetensors.numpy import save_file  # noqa: PLC0415

        try:
            save_file(dict(self._arrays), path)
        except OSError as error:
            raise OutputError(f"cannot save the plan's matrices as '{path}': {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path, sha256: str) -> DenseMaps:
        """Read the matrices of a plan; raise CheckpointError where they are missing or are another plan's."""
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.numpy import load_file  # noqa: PLC0415

        try:
            found = cls(load_file(path))
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"cannot read the plan's matrices '{path}': {error}") from error
        if found.sha256 != sha256:
            raise CheckpointError(f"'{path}' does not hold the matrices of this plan: their hash differs; plan again")
        return found


def beside(plan: Path) -> Path:
    """Return where the matrices of a plan file lie: `plan.json` -> `plan.safetensors`."""
    return plan.with_suffix(".safetensors")


@dataclass
class Fitted:
    """Dense maps by name, and what they change in the recipes: target tensor -> fields."""

    dense: dict[str, Matrix] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, tensor: str, **changes: Any) -> None:
        """Change fields of one target tensor's recipe."""
        self.fields.setdefault(tensor, {}).update(changes)

    def store(self, name: str, values: Matrix) -> str:
        """Keep an array in single precision and return its name."""
        self.dense[name] = np.ascontiguousarray(values, dtype=np.float32)
        return name
