"""Rows of data as they lie on disk or on the Hub: text files, image files, folders, parquet and jsonl; texts in them.

A reader either wants a bit of everything first (calibration) or the data from their start (evaluation): `ordered`.
Either order depends on the data alone, and everything is streamed.
"""

from __future__ import annotations

import glob
import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.errors import InputError, joined

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Row = dict[str, Any]
_TEXT = {".txt": "text", ".md": "text", ".py": "text", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_TABLES = (".parquet", ".jsonl", ".json")
_PREFERRED = ("text", "content")
# Where values are null, which column holds the text is told by the next rows, by so many at most.
_UNTOLD = 64
# Rows are shuffled within a window of so many, in which long documents count as several rows.
_WINDOW = 1000
_NEAR = 256
# Characters that a window holds, and of one text file that are read at a time: what is longer is several rows.
_WINDOW_CHARACTERS, _FILE_CHARACTERS = 1 << 28, 1 << 26
# Groups of rows of a parquet file that are read in turns, and what they may take together, uncompressed.
_MOST_GROUPS, _GROUP_BYTES = 64, 1 << 28


def is_absent(data: str) -> bool:
    """Whether data that can only be files are not there; what may be a Hub data set is not looked for."""
    path = Path(data).expanduser()
    local = data.count("/") > 1 or data.startswith((".", "~")) or path.suffix.lower() in (*_TEXT, *_IMAGES)
    return local and not path.exists()


def rows(data: str, *, ordered: bool = False, split: str = "train", images: bool = False) -> Iterator[Row]:
    """Return the rows of a file, folder or Hub data set, streamed: shuffled, always alike, or `ordered` as they lie.

    `split` is the part of a Hub data set; files have none. For an image model (`images`) image files are read, each a
    row, and not the text beside them. Raises InputError where there are no such data, and while rows are read where a
    file is damaged.
    """
    path = Path(data).expanduser()
    if path.exists():
        files = _image_files(path) if images else _files(path)
        if not ordered:
            random.Random(0).shuffle(files)
        if images and _is_image_file(files[0]):
            # In a random order already: a window would only hold what nobody has asked for yet.
            return map(_image_row, files)
        found = itertools.chain.from_iterable(_file_rows(file, ordered=ordered) for file in files)
        return found if ordered else _shuffled(found)
    if is_absent(data):
        raise InputError(f"the data '{data}' do not exist")
    return _hub_rows(data, split, ordered=ordered)


def _hub_rows(data: str, split: str, *, ordered: bool) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415

    try:
        found: Any = load_dataset(data, split=split, streaming=True)
        # A buffer of one row: its files are shuffled here, its rows below.
        return iter(found) if ordered else _shuffled(found.shuffle(seed=0, buffer_size=1))
    except Exception as error:  # whatever a Hub data set raises, the user needs one sentence
        raise InputError(f"the data '{data}' are no file or folder, and no Hub data set: {error}") from error


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = [p for p in _shown(path) if p.suffix.lower() in _TEXT]
    if not found:
        raise InputError(f"the data folder '{path}' holds no {', '.join(_TEXT)} file")
    if any(p.suffix.lower() in (".parquet", ".jsonl") for p in found):
        # Beside tables of rows these are about them: a README, and a script that loads them.
        found = [p for p in found if not (p.stem.upper() == "README" or p == path / f"{path.name}.py")]
    return found


def identity(data: str, *, images: bool = False) -> list[tuple[str, int, int]]:
    """Return what changes when the files that `rows` reads change: their names, sizes and times; nothing of the Hub."""
    path = Path(data).expanduser()
    files = (_image_files(path) if images else _files(path)) if path.exists() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _shown(folder: Path) -> list[Path]:
    """Return the files below a folder, in order, without hidden ones: what tools and desktops leave is no data."""
    below = (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(p for p in below if p.is_file())


def _is_image_file(path: Path) -> bool:
    return path.suffix.lower() in _IMAGES


def _image_files(path: Path) -> list[Path]:
    """Return the image files of a folder, or its tables where it holds no image file."""
    if path.is_file():
        return [path]
    every = _shown(path)
    images = [p for p in every if _is_image_file(p)]
    tables = [p for p in every if p.suffix.lower() in _TABLES]
    if images and tables:
        raise InputError(
            f"the data folder '{path}' holds image files and the table '{tables[0].relative_to(path)}', and what "
            "either says of the other is not read: give a folder of one kind"
        )
    if not images and not tables:
        raise InputError(f"the data folder '{path}' holds no {', '.join((*_IMAGES, *_TABLES))} file")
    return images or tables


def _image_row(file: Path) -> Row:
    try:
        return {"image": {"bytes": file.read_bytes(), "path": file.name}}
    except OSError as error:
        raise InputError(f"cannot read the data file '{file}': {error.strerror}") from error


def _shuffled(read: Iterable[Row]) -> Iterator[Row]:
    """Yield rows in a random order: each changes places with one of the window before it.

    The window holds fewer rows where they are long.
    """
    generator = random.Random(0)
    window: list[Row] = []
    held = 0
    for row in read:
        window.append(row)
        held += _characters(row)
        while len(window) > 1 and (len(window) > _WINDOW or held > _WINDOW_CHARACTERS):
            # Of those before it; it takes the place of the one that goes.
            place = generator.randrange(len(window) - 1)
            window[place], window[-1] = window[-1], window[place]
            gone = window.pop()
            held -= _characters(gone)
            yield gone
    generator.shuffle(window)
    yield from window


def _characters(row: Row) -> int:
    values = (value.get("bytes") if isinstance(value, dict) else value for value in row.values())
    return sum(len(value) for value in values if isinstance(value, str | bytes))


def _text_rows(file: Path) -> Iterator[Row]:
    """Yield a text file as one row, or cut before a blank into several where it is long."""
    rest = ""
    # A byte-order mark, where there is one, is no text.
    with file.open(encoding="utf-8-sig") as opened:
        while read := opened.read(_FILE_CHARACTERS):
            rest += read
            places = cuts(rest, _FILE_CHARACTERS)
            yield from ({"text": rest[a:b]} for a, b in itertools.pairwise(places[:-1]))
            rest = rest[places[-2] :]
    yield {"text": rest}


def _file_rows(file: Path, *, ordered: bool) -> Iterator[Row]:
    kind = _TEXT.get(file.suffix.lower())
    if kind is None:
        raise InputError(f"the data file '{file}' is none of {', '.join(_TEXT)}")
    if kind == "text":
        try:
            yield from _text_rows(file)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the data file '{file}' as text: {error}") from error
        return
    try:
        yield from _parquet_rows(file, ordered=ordered) if kind == "parquet" else _json_rows(file)
    except Exception as error:  # pyarrow and json each raise their own for a damaged file
        raise InputError(f"cannot read the data file '{file}': {' '.join(str(error).split())[:200]}") from error


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


def _json_rows(file: Path) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415

    # An empty file has no rows; with a name that reads as a pattern it would be another file.
    if file.stat().st_size:
        found: Any = load_dataset("json", data_files=glob.escape(str(file)), split="train", streaming=True)
        yield from found


def is_picture(value: object) -> bool:
    """Whether a value of a row is an image: its bytes, a dict of them, or one that is decoded."""
    return isinstance(value, dict | bytes) or hasattr(value, "convert")


def text_column(read: Iterator[Row], wanted: str, data: str) -> tuple[str, Iterator[Row]]:
    """Return the column that holds the text, and all rows, those that were looked at included.

    It is the one wanted, `text`, `content`, or the only one; "" where there is no row. Raises InputError.
    """
    seen: list[Row] = []
    known: Row = {}
    for row in itertools.islice(read, _UNTOLD):
        seen.append(row)
        # A null does not say what its column holds: the first value does.
        known = row | {name: value for name, value in known.items() if value is not None}
        if _named_text(row, wanted) or all(value is not None for value in known.values()):
            break
    return _text_column(known, wanted, data) if seen else "", itertools.chain(seen, read)


def _named_text(row: Row, wanted: str) -> str:
    """Return the column that holds the text by its name: the one wanted, else one preferred; "" where there is none."""
    may_be = (name for name in ([wanted] if wanted else _PREFERRED) if name in row)
    return next((name for name in may_be if row[name] is None or isinstance(row[name], str)), "")


def _text_column(row: Row, wanted: str, data: str) -> str:
    if named := _named_text(row, wanted):
        return named
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if wanted:
        raise InputError(f"the data '{data}' have no text column '{wanted}': they have {joined(texts) or 'none'}")
    if len(texts) == 1:
        return texts[0]
    images = [name for name, value in row.items() if is_picture(value)]
    kind = f"images ({joined(images)}), and this model reads text" if images else f"columns {joined(row)}"
    raise InputError(
        f"the data '{data}' have no text column: they have {kind}; name one with --column (data.column in a config)"
    )


def documents(data: str, column: str = "", *, ordered: bool = False, split: str = "train") -> Iterator[str]:
    """Yield the texts of a file, folder or Hub data set, one after the other; raise InputError where there is none."""
    found, read = text_column(rows(data, ordered=ordered, split=split), column, data)
    for row in read:
        yield text_of(row, found, data)


def text_of(row: Row, column: str, data: str) -> str:
    """Return the text of one row, "" where it is null; raise InputError where the row has no such text."""
    text = row.get(column)
    if (text is not None and not isinstance(text, str)) or column not in row:
        raise InputError(f"the data '{data}' have a row without text in '{column}': it has {joined(row)}")
    return text or ""


def cuts(text: str, size: int) -> list[int]:
    """Return where a text is cut into pieces of about a size: before a blank where one is near, so no word is split."""

    def moved(at: int) -> int:
        near = range(at, min(at + _NEAR, len(text)))
        return next((i for i in near if text[i].isspace()), at if at + _NEAR < len(text) else len(text))

    return sorted({0, len(text), *map(moved, range(size, len(text), size))})
