"""Files of data of every kind: the same rows however they are stored and packed, and a word about what is not read."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from anysize.errors import InputError
from anysize.io.data_files import is_data_file
from anysize.io.data_identity import in_common
from anysize.io.rows import documents, is_absent, rows
from anysize.training.config import Data
from anysize.training.data import shared_files

TEXTS = ["one, two", "NA", 'said "three"', "four\tfive\nsix", "null"]
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def _table(path: Path, ending: str) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        if ending == ".jsonl":
            file.writelines(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
        else:
            writer = csv.writer(file, delimiter="\t" if ending == ".tsv" else ",")
            writer.writerows([["n", "text"], *enumerate(TEXTS)])
    return path


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".txt"])
def test_rows_are_the_same_however_they_are_stored(tmp_path: Path, ending: str, packed: str) -> None:
    place = tmp_path / f"a{ending}{packed}"
    if ending == ".txt":
        content, wanted = "\ufeffone\ntwo".encode(), ["one\ntwo"]
    else:
        content, wanted = _table(tmp_path / "plain", ending).read_bytes(), TEXTS
        (tmp_path / "plain").unlink()
    place.write_bytes(PACKED[packed](content))
    assert list(documents(str(place), ordered=True)) == wanted
    # A folder is read as its files are.
    assert sorted(documents(str(tmp_path))) == sorted(wanted)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.xz", "a.txt.bz2", "a.jsonl"])
def test_damaged_files_are_one_sentence(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    content = _table(tmp_path / "plain", Path(name).suffixes[0].replace("txt", "csv")).read_bytes() * 50
    packed = PACKED[Path(name).suffixes[-1] if len(Path(name).suffixes) > 1 else ""](content)
    place = tmp_path / name
    place.write_bytes(packed[: len(packed) // 2 + 3])
    with (
        caplog.at_level(logging.WARNING, "datasets"),
        pytest.raises(InputError, match=f"cannot read the data .*{name}"),
    ):
        list(rows(str(place)))
    assert not caplog.records
    assert "error" not in "".join(capfd.readouterr()).lower()


@pytest.mark.parametrize("name", ["b.jsonl.zst", "b.zip", "sub/b.parquet.gz", "b.arrow", "b.json.lz4", "b.odt.gz"])
def test_a_folder_of_which_some_data_would_be_left_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    (tmp_path / "notes.pdf").write_bytes(b"no data")
    assert list(documents(str(tmp_path))) == ["words"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(InputError, match=rf"holds '{name}', of a kind that is not read \(read are \.txt, "):
        rows(str(tmp_path))
    with pytest.raises(InputError, match=r"is none of \.txt, .*, each but parquet also with \.gz, \.bz2, \.xz"):
        list(rows(str(tmp_path / name)))


def test_a_folder_of_which_some_images_would_be_left_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert len(list(rows(str(tmp_path), images=True))) == 1
    for name in ("b.gif", "c.tiff"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 'b\.gif' and 1 more, of a kind that is not read \(read are \.png"):
        rows(str(tmp_path), images=True)


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        ({"text": b"word"}, "", r"columns text \(bytes, which may be anything: store text as strings\); name one"),
        ({"image": {"bytes": b"x"}, "label": 1}, "", r"images \(image\), and this model reads text"),
        ({"a": "x", "n": 1}, "n", r"^the column 'n' of the data '.*' holds int; of text they have a$"),
        ({"n": 1}, "m", r"^the data '.*' have no column 'm'; of text they have nothing$"),
    ],
)
def test_columns_without_text_are_told_by_what_they_hold(
    tmp_path: Path, row: dict[str, Any], column: str, told: str
) -> None:
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=told):
        list(documents(str(tmp_path / "a.parquet"), column))


def test_a_name_tells_whether_it_is_a_file() -> None:
    assert all(is_data_file(Path(name)) for name in ("a.txt", "a.JSONL", "a.csv.gz", "a.png"))
    assert not any(is_data_file(Path(name)) for name in ("a.parquet.gz", "a.png.gz", "squad"))
    assert is_absent("a.jsonl.gz")
    assert not is_absent("squad")


def test_a_hub_data_set_that_ends_meanwhile_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> Any:
        yield {"text": "one"}
        raise ConnectionError("the network is gone")

    monkeypatch.setattr("datasets.load_dataset", broken)
    read = documents("some/set", ordered=True)
    assert next(read) == "one"
    with pytest.raises(InputError, match="cannot read on in the Hub data set 'some/set': the network is gone;"):
        next(read)


def test_data_that_have_a_file_in_common_are_known_by_what_is_in_it(tmp_path: Path) -> None:
    for name, text in (("train/a.txt", "one"), ("train/b.txt", "two"), ("held/c.txt", "two"), ("held/d.txt", "six")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    train, held = (str(tmp_path / name) for name in ("train", "held"))
    assert in_common(train, held) == str(tmp_path / "held" / "c.txt")
    assert in_common(train, f"{held}/d.txt") == ""
    assert in_common(train, "some/set") == ""
    for name in ("train/e.txt", "held/e.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "held" / "c.txt").unlink()
    # Files without anything are no data.
    assert in_common(train, held) == ""
    told = shared_files(Data(train=f"{train}/a.txt", validation=train, test=held))
    assert told == ["data.train and data.validation have 'a.txt' in common: what is measured there was learned"]
