"""Read checkpoints: strict safetensors headers, one tensor at a time into memory that the caller bounds.

Headers are parsed here, not by the safetensors library, because the plan needs byte ranges, because nothing may be
mapped (mapped pages count as resident), and because a header that lies has to be refused with a sentence.
The format: 8 bytes little-endian header length, a JSON header, then the data (safetensors README, "Format").
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from anysize.config import read_config
from anysize.errors import CheckpointError, joined

if TYPE_CHECKING:
    import torch

_ITEM_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS, _MAX_COUNT = 64, 2**63 - 1
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: storage type, shape, file, and absolute byte range in it."""

    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    begin: int = 0
    end: int = 0


class TensorSource(Protocol):
    """What a plan is made from and applied to: a config and named tensors, on disk or in memory."""

    @property
    def location(self) -> str: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def config_sha256(self) -> str: ...
    @property
    def headers_sha256(self) -> str: ...
    @property
    def identity(self) -> str:
        """Changes whenever the weights may have changed: a run is resumed from the very same weights only."""
        ...

    def read(self, name: str) -> torch.Tensor: ...


# (name, first row of the first stored dim, count) -> those rows.
ReadRows = Callable[[str, int, int], "torch.Tensor"]


def sha256_json(value: object) -> str:
    """Return the SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def headers_sha256(tensors: Mapping[str, TensorInfo]) -> str:
    """Return a hash of the names, storage types and shapes of all tensors, whatever files they lie in."""
    return sha256_json(sorted((name, info.dtype, list(info.shape)) for name, info in tensors.items()))


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict; raise ValueError where a name stands twice: readers differ in what they take."""
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice")
    return dict(pairs)


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return (header, first data byte, file size); refuse a file that is no safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"'{path}' is not a safetensors file or is cut short: it says its header has {length:,} bytes, "
                    f"the file has {size:,}"
                )
            header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unrepeated)
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"'{path}' has a header that is not a JSON object")
    return header, 8 + length, size


def _are_counts(values: list[object], limit: int) -> bool:
    """Whether all are whole numbers of 0 to `limit`; in Python, but not in JSON, `true` is one as well."""
    return all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= limit for n in values)


def _entry(path: Path, name: str, entry: object, first: int, size: int) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end]} if (
            dtype in _ITEM_BYTES and len(shape) <= _MAX_DIMS and _are_counts([*shape, begin, end], _MAX_COUNT)
        ):
            pass
        case _:
            raise CheckpointError(
                f"'{path}' describes tensor {name!r} in a way that is not safetensors: {entry!r:.200}"
            )
    wanted = prod(shape) * _ITEM_BYTES[dtype]
    if end - begin != wanted:
        raise CheckpointError(
            f"'{path}': tensor {name!r} of shape {shape} and type {dtype} needs {wanted:,} bytes, its header gives "
            f"bytes {begin:,} to {end:,}"
        )
    if first + end > size:
        raise CheckpointError(
            f"'{path}' is cut short: tensor {name!r} ends at byte {first + end:,}, the file has {size:,}"
        )
    return TensorInfo(dtype, tuple(shape), path, first + begin, first + end)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return every tensor of one safetensors file; raise CheckpointError for a header that lies.

    Refused: unknown types, sizes that do not match the byte range, ranges that overlap, leave holes or leave the file.
    """
    header, first, size = _header(path)
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry, first, size) for name, entry in header.items()}
    position = first
    for name, info in sorted(found.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != position:
            raise CheckpointError(
                f"'{path}': tensor {name!r} begins at byte {info.begin:,}, but the one before ends at {position:,}"
            )
        position = info.end
    if position != size:
        raise CheckpointError(f"'{path}' has {size - position:,} bytes after its last tensor")
    return found


def stays_inside(folder: Path, path: Path) -> bool:
    """Whether a file, links resolved, lies in its checkpoint folder (or in the blobs of the same hub snapshot)."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    real = path.resolve()
    return any(real.is_relative_to(place) for place in allowed)


def _shards(folder: Path) -> dict[str, list[str]]:
    """Return file name -> tensor names that the index gives it ([] where there is no index)."""
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        if (folder / SINGLE_NAME).is_file():
            return {SINGLE_NAME: []}
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"'{folder}' holds pickled weights only ({', '.join(pickles[:3])}): loading them can run code; convert "
                "them first, with save_pretrained in a place you trust"
            )
        raise CheckpointError(f"'{folder}' has no {SINGLE_NAME} and no {INDEX_NAME}")
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"), object_pairs_hook=_unrepeated)
    except OSError as error:
        raise CheckpointError(f"cannot read '{index_path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{index_path}' is not a safetensors index, not valid JSON: {error}") from error
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise CheckpointError(f"'{index_path}' is not a safetensors index: it has no object 'weight_map'")
    shards: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or file != os.path.basename(file):
            raise CheckpointError(
                f"'{index_path}' puts tensor {name!r} into {file!r}, which is not a safetensors file in this folder"
            )
        shards.setdefault(file, []).append(name)
    if (folder / SINGLE_NAME).is_file() and SINGLE_NAME not in shards:
        raise CheckpointError(
            f"'{folder}' holds both {SINGLE_NAME} and {INDEX_NAME}, and loaders differ in which of them they read: "
            "move away the one that is not the model"
        )
    return shards


class Checkpoint:
    """A checkpoint folder on disk, headers checked, weights unread.

    Raises CheckpointError for whatever is missing, malformed or unsafe in it.
    """

    def __init__(self, folder: Path, *, location: str | None = None) -> None:
        """Open a folder; `location` is what the user calls it (a Hub id), the folder's absolute path by default."""
        if not folder.is_dir():
            raise CheckpointError(f"'{folder}' is not a folder")
        self.folder = folder
        self.location = location or str(folder.absolute())
        self.config: Mapping[str, Any] = read_config(folder)
        self.tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for file, names in _shards(folder).items():
            path = folder / file
            if not path.is_file():
                problems.append(f"the index names '{file}', which is missing")
                continue
            if not stays_inside(folder, path):
                raise CheckpointError(f"'{path}' is a link that leaves the checkpoint folder")
            found = read_header(path)
            problems += [f"'{file}' lacks tensor {name!r}" for name in names if name not in found]
            problems += [f"tensor {name!r} lies in two files" for name in found if name in self.tensors]
            if names:
                problems += [
                    f"'{file}' holds {name!r}, which the index does not name" for name in set(found) - set(names)
                ]
            self.tensors.update(found)
        if problems:
            raise CheckpointError(f"'{folder}' is incomplete: {joined(problems[:5])}")

    @property
    def config_sha256(self) -> str:
        return sha256_json(self.config)

    @property
    def headers_sha256(self) -> str:
        return headers_sha256(self.tensors)

    @property
    def identity(self) -> str:
        try:
            stats = {path: path.stat() for path in {info.path for info in self.tensors.values()} if path is not None}
        except OSError as error:
            raise CheckpointError(f"cannot read '{error.filename}': {error.strerror}") from error
        return sha256_json(sorted((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()))

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, read whole into fresh memory; nothing stays mapped."""
        info = self.tensors[name]
        assert info.path is not None
        return read_bytes(info)


def read_bytes(info: TensorInfo, first_row: int = 0, num_rows: int | None = None) -> torch.Tensor:
    """Return a tensor, or a range of its rows, from its file; raise CheckpointError if the file ended early."""
    rows = info.shape[0] if info.shape else 1
    return next(read_ranges(info, [(first_row, rows - first_row if num_rows is None else num_rows)]))


def read_ranges(info: TensorInfo, ranges: Iterable[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """Yield ranges of a tensor's rows, each by its first row and their number; the file is opened once for all.

    Raises CheckpointError if the file ended early.
    """
    import torch  # noqa: PLC0415

    from anysize.io.dtypes import TORCH  # noqa: PLC0415

    assert info.path is not None
    row_bytes = (info.end - info.begin) // max(info.shape[0] if info.shape else 1, 1)
    try:
        with info.path.open("rb", buffering=0) as file:
            for first_row, num_rows in ranges:
                buffer = np.empty(num_rows * row_bytes, np.uint8)
                view, position, done = buffer.data, info.begin + first_row * row_bytes, 0
                while done < len(view):
                    count = os.preadv(file.fileno(), [view[done:]], position + done)
                    if count == 0:
                        raise CheckpointError(f"'{info.path}' ended while its tensor was read: it changed under us")
                    done += count
                shape = (num_rows, *info.shape[1:]) if info.shape else ()
                if buffer.size == 0:
                    yield torch.empty(shape, dtype=TORCH[info.dtype])
                else:
                    yield torch.from_numpy(buffer).view(TORCH[info.dtype]).reshape(shape)
    except OSError as error:
        raise CheckpointError(f"cannot read '{info.path}': {error.strerror}") from error
