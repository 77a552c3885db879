"""Top-k targets of a teacher on disk: computed the first time that a sequence comes by, read ever after.

They are kept under the teacher, the data, k and the temperature: another run, arm or rate finds them again. Every
sequence has a flag that is set after its targets are written, so that a killed run leaves nothing half made.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anysize.errors import InputError


class TargetCache:
    """The k likeliest classes of every place of every sequence: `of(sequences, compute)` computes what is not there.

    classes: uint16 or uint32, logs: float16 [sequences, length, k]; num_bytes says what they take in all.
    """

    def __init__(
        self, folder: Path, identity: str, *, num_sequences: int, length: int, k: int, num_classes: int
    ) -> None:
        k = min(k, num_classes)
        shape = (num_sequences, length, k)
        dtype = "uint16" if num_classes <= 1 << 16 else "uint32"
        key = json.dumps([identity, shape, dtype, 1])
        home = folder.expanduser() / hashlib.sha256(key.encode()).hexdigest()[:24]
        try:
            home.mkdir(parents=True, exist_ok=True)
            self.classes = stored_array(home / "classes", dtype, shape)
            self.logs = stored_array(home / "logs", "float16", shape)
            self.there = stored_array(home / "there", "uint8", (num_sequences,))
        except OSError as error:
            raise InputError(f"distill.cache: '{folder}' cannot hold the targets: {error}") from error

    @property
    def num_bytes(self) -> int:
        return int(self.classes.nbytes + self.logs.nbytes + self.there.nbytes)

    def of(
        self, sequences: torch.Tensor, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (classes int64, logs float32) [batch, length, k] of sequences by number, as they are stored."""
        rows = sequences.cpu().numpy()
        if not bool(self.there[rows].all()):
            classes, logs = compute()
            self.classes[rows] = classes.cpu().numpy().astype(self.classes.dtype)
            self.logs[rows] = logs.cpu().numpy().astype(np.float16)
            self.there[rows] = 1
        classes = torch.from_numpy(self.classes[rows].astype(np.int64))
        return classes, torch.from_numpy(self.logs[rows].astype(np.float32))


def stored_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return a file as an array; a new one is sparse and takes room as it is filled."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # Never emptied: another process may have it mapped already, or be about to.
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.fstat(file).st_size != size:
            os.ftruncate(file, size)
    finally:
        os.close(file)
    return np.memmap(path, dtype, "r+", shape=shape)
