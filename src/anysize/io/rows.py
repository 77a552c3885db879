"""Rows of data, of files or of the Hub, in an order of their own or mixed; and the texts in them.

A reader either wants a bit of everything first (calibration) or the data from their start (evaluation): `ordered`.
Either order depends on the data alone, and everything is streamed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anysize.errors import InputError, joined
from anysize.io.data_files import Row, file_rows, image_files, image_row, is_data_file, is_image_file, text_files

_PREFERRED = ("text", "content")
# Where values are null, which column holds the text is told by the next rows, by so many at most.
_UNTOLD = 64
# Rows are shuffled within a window of so many, in which long documents count as several rows.
_WINDOW = 1000
# Characters that a window holds.
_WINDOW_CHARACTERS = 1 << 28


def is_absent(data: str) -> bool:
    """Whether data that can only be files are not there; what may be a Hub data set is not looked for."""
    path = Path(data).expanduser()
    local = data.count("/") > 1 or data.startswith((".", "~")) or is_data_file(path)
    return local and not path.exists()


def rows(data: str, *, ordered: bool = False, split: str = "train", images: bool = False) -> Iterator[Row]:
    """Return the rows of a file, folder or Hub data set, streamed: shuffled, always alike, or `ordered` as they lie.

    `split` is the part of a Hub data set; files have none. For an image model (`images`) image files are read, each a
    row, and not the text beside them. Raises InputError where there are no such data, and while rows are read where a
    file is damaged.
    """
    if not data.strip():
        # It would be the folder that we are in.
        raise InputError("the data have no name: wanted a file, a folder or a Hub data set")
    path = Path(data).expanduser()
    if path.exists():
        files = image_files(path) if images else text_files(path)
        if not ordered:
            random.Random(0).shuffle(files)
        if images and is_image_file(files[0]):
            # In a random order already: a window would only hold what nobody has asked for yet.
            return map(image_row, files)
        found = itertools.chain.from_iterable(file_rows(file, ordered=ordered) for file in files)
        return found if ordered else _shuffled(found)
    if is_absent(data):
        raise InputError(f"the data '{data}' do not exist")
    return _hub_rows(data, split, ordered=ordered)


def _hub_rows(data: str, split: str, *, ordered: bool) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415

    try:
        found: Any = load_dataset(data, split=split, streaming=True)
    except Exception as error:  # whatever a Hub data set raises, the user needs one sentence
        raise InputError(f"the data '{data}' are no file or folder, and no Hub data set: {error}") from error
    # A buffer of one row: its files are shuffled here, its rows below.
    read = _read_on(data, found if ordered else found.shuffle(seed=0, buffer_size=1))
    return read if ordered else _shuffled(read)


def _read_on(data: str, found: Iterable[Row]) -> Iterator[Row]:
    try:
        yield from found
    except Exception as error:  # a network that fails, a file that is damaged: each library raises its own
        why = " ".join(str(error).split())[:200]
        raise InputError(f"cannot read on in the Hub data set '{data}': {why}; the same command tries again") from error


def identity(data: str, *, images: bool = False) -> list[tuple[str, int, int]]:
    """Return what changes when the files that `rows` reads change: their names, sizes and times; nothing of the Hub."""
    path = Path(data).expanduser()
    files = (image_files(path) if images else text_files(path)) if path.exists() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


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
        of_them = f"of text they have {', '.join(texts) or 'nothing'}"
        if wanted in row:
            raise InputError(f"the column '{wanted}' of the data '{data}' holds {_kind(row[wanted])}; {of_them}")
        raise InputError(f"the data '{data}' have no column '{wanted}'; {of_them}")
    if len(texts) == 1:
        return texts[0]
    images = [name for name, value in row.items() if is_picture(value) and not isinstance(value, bytes)]
    columns = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items())
    kind = f"images ({joined(images)}), and this model reads text" if images else f"columns {columns}"
    raise InputError(
        f"the data '{data}' have no text column: they have {kind}; name one with --column (data.column in a config)"
    )


def _kind(value: object) -> str:
    """Return what a value of a row is, in words."""
    if isinstance(value, bytes):
        return "bytes, which may be anything: store text as strings"
    return "nothing but nulls" if value is None else "text" if isinstance(value, str) else type(value).__name__


def _place_of(row: Row, data: str) -> str:
    """Say in which file of a folder rows have the columns of this one."""
    path = Path(data).expanduser()
    for file in text_files(path) if path.is_dir() else []:
        first = next(file_rows(file, ordered=True), None)
        if first is not None and first.keys() == row.keys():
            return f" (in '{file.relative_to(path)}': if it is no text to be read, move it out of the folder)"
    return ""


def documents(data: str, column: str = "", *, ordered: bool = False, split: str = "train") -> Iterator[str]:
    """Yield the texts of a file, folder or Hub data set, one after the other; raise InputError where there is none."""
    found, read = text_column(rows(data, ordered=ordered, split=split), column, data)
    for row in read:
        yield text_of(row, found, data)


def text_of(row: Row, column: str, data: str) -> str:
    """Return the text of one row, "" where it is null; raise InputError where the row has no such text."""
    text = row.get(column)
    if column not in row:
        has = ", ".join(row) or "nothing"
        raise InputError(f"the data '{data}' have a row without '{column}': it has {has}{_place_of(row, data)}")
    if text is not None and not isinstance(text, str):
        raise InputError(f"the data '{data}' have a row without text in '{column}': it is {_kind(text)}")
    return text or ""
