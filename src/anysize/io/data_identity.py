"""What tells data from what may lie in their place another time, and from other data."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from anysize.io.data_files import image_files, shown_files, text_files

# Bytes of a file that are looked at to know it again, at its beginning and at its end.
_ENDS = 1 << 16


def data_identity(data: str) -> str:
    """Return what changes when the data change: names, sizes and times of files, or the commit of a Hub data set."""
    path = Path(data).expanduser()
    if path.exists():
        return json.dumps([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in _files(path)])
    from huggingface_hub import HfApi  # noqa: PLC0415

    try:
        return f"{data}@{HfApi().dataset_info(data).sha}"
    except Exception:  # whatever the network or the Hub does, the name alone has to do
        return data


def data_contents(data: str) -> str:
    """Return what changes when the data change, wherever they lie: names, sizes, and how files begin and end."""
    path = Path(data).expanduser()
    if not path.exists():
        return data_identity(data)
    home = path if path.is_dir() else path.parent
    told = [(str(file.relative_to(home)), *_content(file)) for file in _files(path)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def same_data(before: str, now: str) -> bool:
    """Whether two identities are of the same data: of a Hub data set without a network, the id is all there is."""
    return before == now or before.startswith(f"{now}@") or now.startswith(f"{before}@")


def in_common(one: str, other: str, *, images: bool) -> str:
    """Return the name of a file that is read of both data, wherever its copies lie; "" where there is none.

    Parts of a Hub data set of other names are other data. images: whether it is images that are read.
    """
    first, second = (Path(data).expanduser() for data in (one, other))
    if not (first.exists() and second.exists()):
        return ""
    ours, theirs = (image_files(path) if images else text_files(path) for path in (first, second))
    # Only what is as large can be the same.
    sizes = {file.stat().st_size for file in theirs} - {0}
    known = {_content(file) for file in ours if file.stat().st_size in sizes}
    sizes = {size for size, _ in known}
    return next((str(file) for file in theirs if file.stat().st_size in sizes and _content(file) in known), "")


def _files(path: Path) -> list[Path]:
    return shown_files(path) if path.is_dir() else [path]


def _content(file: Path) -> tuple[int, str]:
    """Return the size of a file, and a hash of how it begins and ends."""
    with file.open("rb") as opened:
        size = opened.seek(0, os.SEEK_END)
        opened.seek(0)
        ends = opened.read(_ENDS)
        opened.seek(max(0, size - _ENDS))
        ends += opened.read(_ENDS)
    return size, hashlib.sha256(ends).hexdigest()
