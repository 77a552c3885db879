"""Top-k targets of a teacher on disk: computed the first time that a sequence comes by, read ever after.

They are kept under the teacher, the data, k and the temperature: another run, arm or rate finds them again. Every
sequence has a flag that is set after its targets are written, so that a killed run leaves nothing half made.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anysize.io.whole import told_of_disk


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
        self._kept = partial(told_of_disk, f"distill.cache: '{folder}' cannot hold the targets")
        with self._kept():
            home.mkdir(parents=True, exist_ok=True)
            self.classes = StoredRows(home / "classes", dtype, shape)
            self.logs = StoredRows(home / "logs", "float16", shape)
            self.there = StoredRows(home / "there", "uint8", (num_sequences,))

    @property
    def num_bytes(self) -> int:
        return self.classes.num_bytes + self.logs.num_bytes + self.there.num_bytes

    def of(
        self, sequences: torch.Tensor, compute: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (classes int64, logs float32) [batch, length, k] of sequences by number, as they are stored."""
        rows = sequences.cpu().numpy()
        with self._kept():
            if not bool(self.there[rows].all()):
                classes, logs = compute()
                self.classes[rows] = classes.cpu().numpy()
                self.logs[rows] = logs.cpu().numpy()
                self.there[rows] = np.ones(len(rows))
            classes = torch.from_numpy(self.classes[rows].astype(np.int64))
            return classes, torch.from_numpy(self.logs[rows].astype(np.float32))


class StoredRows:
    """An array in a file, read and written by rows; a new one is sparse and takes room as it is filled.

    Raises OSError where it cannot be read or written: mapped into memory, a full disk would end the process without a
    word, some even where a part that was never written is read.
    """

    def __init__(self, path: Path, dtype: str, shape: tuple[int, ...]) -> None:
        self._dtype, self._row = np.dtype(dtype), shape[1:]
        self._row_bytes = prod(self._row) * self._dtype.itemsize
        self.num_bytes = size = shape[0] * self._row_bytes
        # Never emptied: another process may be at it already.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        weakref.finalize(self, os.close, self._file)
        if os.fstat(self._file).st_size != size:
            os.ftruncate(self._file, size)

    def __getitem__(self, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        data = b"".join(self._read(int(row)) for row in rows)
        return np.frombuffer(data, self._dtype).reshape(len(rows), *self._row)

    def _read(self, row: int) -> bytes:
        data = b""
        while len(data) < self._row_bytes:
            more = os.pread(self._file, self._row_bytes - len(data), row * self._row_bytes + len(data))
            if not more:
                raise OSError("it ended while it was read: it changed under us")
            data += more
        return data

    def __setitem__(self, rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> None:
        for row, found in zip(rows, values, strict=True):
            data, done = np.asarray(found, self._dtype).tobytes(), 0
            while done < len(data):
                done += os.pwrite(self._file, data[done:], int(row) * self._row_bytes + done)
