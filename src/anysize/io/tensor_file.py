"""A safetensors file, written tensor by tensor; `reader` reads it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

# Name, stored type such as "F32", shape, bytes.
Entry = tuple[str, str, Sequence[int], int]


def header_bytes(tensors: Iterable[Entry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return what comes before the tensors, which follow in this order without a gap.

    Padded, so that the first tensor is aligned; the others are where wide types come first.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, num_bytes in tensors:
        begin, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_one_by_one(
    path: Path,
    tensors: Iterable[Entry],
    read: Callable[[str], Any],
    metadata: Mapping[str, str] | None = None,
    *,
    synced: bool = False,
    digests: str = "",
) -> None:
    """Write a file at once under its name, with one tensor in memory at a time; what fails leaves nothing behind.

    read: gives the bytes of a tensor by its name, as anything with a buffer. synced: a power loss cannot
    leave a file under this name that is not whole. digests: under this name the metadata hold the SHA-256 of each
    tensor, as JSON. Raises OSError.
    """
    entries = sorted(tensors, key=lambda entry: (-int(entry[1][1:]), entry[0]))
    # Each tensor is read once: its digest is put in its place at the end.
    found = {name: "0" * 64 for name, *_ in entries}

    def header() -> bytes:
        return header_bytes(entries, {**(metadata or {}), digests: json.dumps(found)} if digests else metadata)

    partial = path.with_name(f".{path.name}.writing")
    try:
        with partial.open("wb") as file:
            file.write(header())
            for name, *_ in entries:
                data = read(name)
                file.write(data)
                if digests:
                    found[name] = hashlib.sha256(data).hexdigest()
            if digests:
                file.seek(0)
                file.write(header())
            if synced:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
