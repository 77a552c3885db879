"""Files of data: which of a folder are read, and the rows in one, streamed and decompressed as they are read.

Text files are rows of text; parquet, JSON and CSV files are tables of rows; an image file is a row.
"""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import itertools
import lzma
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.errors import InputError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Row = dict[str, Any]
_TABLES = {".parquet": "parquet", ".jsonl": "json", ".jsonlines": "json", ".ndjson": "json", ".json": "json",
           ".csv": "csv", ".tsv": "tsv"}  # fmt: skip
_TEXT = {".txt": "text", ".md": "text", ".py": "text", **_TABLES}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Kinds of tables that may hold images, and their endings.
_OF_IMAGES = ("parquet", "json")
_IMAGE_TABLES = tuple(ending for ending, kind in _TABLES.items() if kind in _OF_IMAGES)
# After any ending of text but parquet, which packs its own pages.
_PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Data that nothing here reads: in a folder they would be missed without a word.
_UNREAD = (
    ".zst", ".zstd", ".lz4", ".7z", ".zip", ".rar", ".tar", ".tgz", ".tbz2", ".txz", ".z", ".gzip", ".arrow",
    ".feather", ".avro", ".orc", ".npy", ".npz", ".pkl", ".h5", ".hdf5", ".db", ".sqlite", *_PACKED,
)  # fmt: skip
_UNREAD_TEXT = (*_UNREAD, ".html", ".htm", ".xml", ".xls", ".xlsx", ".pdf", ".doc", ".docx", ".odt", ".epub")
_UNREAD_IMAGES = (*_UNREAD, ".gif", ".tif", ".tiff", ".avif", ".heic", ".svg", ".jfif", ".jp2")
# How near to where a text would be cut a blank is looked for.
_NEAR = 256
# Characters of one text file that are read at a time: what is longer is several rows.
_FILE_CHARACTERS = 1 << 26
# Groups of rows of a parquet file that are read in turns, and what they may take together, uncompressed.
_MOST_GROUPS, _GROUP_BYTES = 64, 1 << 28


def _kind_of(path: Path) -> str | None:
    """Return what a file of text is by its name: "text", "parquet", "json", "csv", "tsv", or None."""
    ending = path.suffix.lower()
    if ending not in _PACKED:
        return _TEXT.get(ending)
    kind = _TEXT.get(Path(path.stem).suffix.lower())
    return None if kind == "parquet" else kind


def _is_image_table(path: Path) -> bool:
    return _kind_of(path) in _OF_IMAGES


def is_image_file(path: Path) -> bool:
    """Whether a file is an image by its name."""
    return path.suffix.lower() in _IMAGES


def is_data_file(path: Path) -> bool:
    """Whether a name is that of a file that is read here."""
    return is_image_file(path) or _kind_of(path) is not None


def text_files(path: Path) -> list[Path]:
    """Return the files of text in a folder, in order, or the one file; raise InputError for a folder without."""
    if path.is_file():
        return [path]
    every = shown_files(path)
    found = [p for p in every if _kind_of(p)]
    _require_read(path, [p for p in every if not _kind_of(p)], _UNREAD_TEXT, _TEXT)
    if not found:
        raise InputError(f"the data folder '{path}' holds no {', '.join(_TEXT)} file")
    if any(_kind_of(p) != "text" and p.suffix.lower() != ".json" for p in found):
        # Beside tables of rows these are about them: a README, and a script that loads them.
        found = [p for p in found if not (p.name.split(".")[0].upper() == "README" or p == path / f"{path.name}.py")]
    return found


def image_files(path: Path) -> list[Path]:
    """Return the image files of a folder, or its tables where it holds no image file; raise InputError for neither."""
    if path.is_file():
        return [path]
    every = shown_files(path)
    images, tables = [p for p in every if is_image_file(p)], [p for p in every if _is_image_table(p)]
    _require_read(path, [p for p in every if not is_data_file(p)], _UNREAD_IMAGES, (*_IMAGES, *_IMAGE_TABLES))
    if images and tables:
        raise InputError(
            f"the data folder '{path}' holds image files and the table '{tables[0].relative_to(path)}', and what "
            "either says of the other is not read: give a folder of one kind"
        )
    if not images and not tables:
        raise InputError(f"the data folder '{path}' holds no {', '.join((*_IMAGES, *_IMAGE_TABLES))} file")
    return images or tables


def shown_files(folder: Path) -> list[Path]:
    """Return the files below a folder, in order, linked folders included, without hidden ones.

    What tools and desktops leave is no data.
    """
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        # A link may lead back to where it lies.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(place) / name for name in names if not name.startswith(".")]
    return sorted(p for p in found if p.is_file())


def _require_read(folder: Path, others: Sequence[Path], refused: Sequence[str], kinds: Iterable[str]) -> None:
    """Refuse a folder of which some data would be left out; files that are no data at all are no matter."""
    unread = [p for p in others if p.suffix.lower() in refused]
    if unread:
        more = f" and {len(unread) - 1} more" if len(unread) > 1 else ""
        raise InputError(
            f"the data folder '{folder}' holds '{unread[0].relative_to(folder)}'{more}, of a kind that is not read "
            f"(read are {', '.join(kinds)}): unpack or convert what is to be read, and give a folder of nothing else"
        )


def image_row(file: Path) -> Row:
    """Return an image file as a row; raise InputError where it cannot be read."""
    try:
        return {"image": {"bytes": file.read_bytes(), "path": file.name}}
    except OSError as error:
        raise InputError(f"cannot read the data file '{file}': {error.strerror}") from error


def file_rows(file: Path, *, ordered: bool) -> Iterator[Row]:
    """Yield the rows of a file, of parquet `ordered` or not; raise InputError for other kinds and damaged files."""
    kind = _kind_of(file)
    if kind is None:
        packed = f", each but parquet also with {', '.join(_PACKED)}"
        raise InputError(f"the data file '{file}' is none of {', '.join(_TEXT)}{packed}")
    try:
        if kind == "parquet":
            yield from _parquet_rows(file, ordered=ordered)
        elif kind == "json":
            yield from _json_rows(file)
        else:
            yield from _text_rows(file) if kind == "text" else _csv_rows(file, "\t" if kind == "tsv" else ",")
    except Exception as error:  # each library, and each kind of packing, says in its own way that a file is damaged
        why = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read the data file '{file}'{' as text' if kind == 'text' else ''}: {why}") from error


def _text_rows(file: Path) -> Iterator[Row]:
    """Yield a text file as one row, or cut before a blank into several where it is long."""
    rest = ""
    with _opened(file) as opened:
        while read := opened.read(_FILE_CHARACTERS):
            rest += read
            places = cuts(rest, _FILE_CHARACTERS)
            yield from ({"text": rest[a:b]} for a, b in itertools.pairwise(places[:-1]))
            rest = rest[places[-2] :]
    yield {"text": rest}


def _opened(file: Path, newline: str | None = None) -> Any:
    """Return a file opened as text, unpacked as it is read; a byte-order mark, where there is one, is no text."""
    return _PACKED.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline=newline)


def _csv_rows(file: Path, separator: str) -> Iterator[Row]:
    """Yield the rows of a file whose first row names the columns; every value is text, whatever it reads like."""
    csv.field_size_limit(sys.maxsize)
    # Line ends within a value are its own.
    with _opened(file, newline="") as opened:
        read = csv.reader(opened, delimiter=separator, strict=True)
        columns = next(read, [])
        if twice := [name for name in columns if columns.count(name) > 1]:
            raise ValueError(f"its first row, which names the columns, has '{twice[0]}' twice")
        if len(columns) == 1 and any(sign in columns[0] for sign in ";\t|"):
            raise ValueError(f"its first row is '{columns[0]}': wanted the names of the columns, separated by commas")
        for values in read:
            # Many programs end every row with a separator.
            while len(values) > len(columns) and not values[-1]:
                values.pop()
            if values and len(values) != len(columns):
                raise ValueError(
                    f"line {read.line_num} has {len(values)} fields, and the first row names {len(columns)} columns"
                )
            if values:
                yield dict(zip(columns, values, strict=True))


def _json_rows(file: Path) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415
    from datasets.utils.logging import get_verbosity, set_verbosity  # noqa: PLC0415

    if "::" in str(file):
        raise ValueError("a '::' in a name is for what lies inside of archives; rename it")
    with _opened(file) as opened:
        # An empty file has no rows.
        if not opened.read(1):
            return
    # A name that reads as a pattern would be another file.
    name = glob.escape(str(file))
    read: Iterator[Row] = iter(load_dataset("json", data_files=name, split="train", streaming=True))
    while True:
        # What it says of a damaged file, we say ourselves.
        level = get_verbosity()
        set_verbosity(CRITICAL)
        try:
            row = next(read, None)
        finally:
            set_verbosity(level)
        if row is None:
            return
        yield row


def _parquet_rows(file: Path, *, ordered: bool) -> Iterator[Row]:
    from pyarrow import parquet  # noqa: PLC0415

    with parquet.ParquetFile(file) as opened:
        groups = list(range(opened.num_row_groups))
        if ordered:
            for batch in opened.iter_batches(batch_size=64):
                yield from batch.to_pylist()
            return
        random.Random(0).shuffle(groups)
        largest = max((opened.metadata.row_group(group).total_byte_size for group in groups), default=1)
        at_once = max(1, min(_MOST_GROUPS, _GROUP_BYTES // max(1, largest)))
        readers = [_group_rows(opened, groups[first::at_once]) for first in range(at_once)]
        # In turns, because rows often lie by label or by author and a window holds few groups.
        for turn in itertools.zip_longest(*readers):
            yield from (row for row in turn if row is not None)


def _group_rows(opened: ParquetFile, groups: list[int]) -> Iterator[Row]:
    for group in groups:
        for batch in opened.iter_batches(batch_size=16, row_groups=[group]):
            yield from batch.to_pylist()


def cuts(text: str, size: int) -> list[int]:
    """Return where a text is cut into pieces of about a size: before a blank where one is near, so no word is split."""

    def moved(at: int) -> int:
        near = range(at, min(at + _NEAR, len(text)))
        return next((i for i in near if text[i].isspace()), at if at + _NEAR < len(text) else len(text))

    return sorted({0, len(text), *map(moved, range(size, len(text), size))})
