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
        content, wanted = "\ufeffone\r\ntwo".encode(), ["one\ntwo"]
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


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("text,n\na,b,1\n", "line 2 has 3 fields, and the first row names 2 columns"),
        ("text,n\na,1\nb\n", "line 3 has 1 fields, and the first row names 2 columns"),
        ("text\nHello, world\n", "line 2 has 2 fields"),
        ("text;n\na;1\n", "its first row is 'text;n': wanted the names of the columns, separated by commas"),
        ("text,text\na,b\n", "its first row, which names the columns, has 'text' twice"),
        ('text\n"not closed\n', "unexpected end of data"),
    ],
)
def test_a_csv_file_of_another_form_is_refused_and_nothing_of_it_is_lost(
    tmp_path: Path, content: str, told: str
) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=rf"cannot read the data file '.*a\.csv': {told}"):
        list(rows(str(tmp_path / "a.csv"), ordered=True))


def test_what_reads_like_a_number_in_a_csv_file_is_text(tmp_path: Path) -> None:
    place = tmp_path / "a.csv"
    for content, wanted in (
        ("text,s\n007,a\n,b\n", ["007", ""]),
        ("text,n\n1,x,\n2,y,,\n\n", ["1", "2"]),
        ("text\n" + "1\n" * 12_000 + "word\n", ["1"] * 12_000 + ["word"]),
        (f"text\n{'w' * 200_000}\n", ["w" * 200_000]),
        ("", []),
        ("text\n", []),
    ):
        place.write_text(content, encoding="utf-8")
        assert list(documents(str(place), ordered=True)) == wanted


def test_empty_files_have_no_rows_and_linked_folders_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.ndjson").write_text('{"text": "one"}\n', encoding="utf-8")
    (tmp_path / "data" / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "data" / "README.md.gz").write_bytes(gzip.compress(b"about"))
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "back").symlink_to(tmp_path / "data")
    assert list(documents(str(tmp_path / "data"))) == ["one"]
    (tmp_path / "more" / "a::b.jsonl").write_text('{"text": "two"}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"a::b\.jsonl': a '::' in a name"):
        list(documents(str(tmp_path / "data")))


def test_the_file_whose_rows_have_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    (tmp_path / "b.csv").write_text("file,label\na,1\n", encoding="utf-8")
    told = r"have a row without 'text': it has file, label \(in 'b\.csv': if it is no text to be read, move it out"
    with pytest.raises(InputError, match=told):
        list(documents(str(tmp_path), ordered=True))


@pytest.mark.parametrize("name", ["b.jsonl.zst", "b.zip", "sub/b.parquet.gz", "b.arrow", "b.json.lz4", "b.odt.gz"])
def test_a_folder_of_which_some_data_would_be_left_out_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8")
    (tmp_path / "LICENSE").write_bytes(b"no data")
    assert list(documents(str(tmp_path))) == ["words"]
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"data")
    with pytest.raises(InputError, match=rf"holds '{name}', of a kind that is not read \(read are \.txt, "):
        rows(str(tmp_path))
    with pytest.raises(InputError, match=r"is none of \.txt, .*, each but parquet also with \.gz, \.bz2, \.xz"):
        list(rows(str(tmp_path / name)))


def test_a_folder_of_which_some_images_would_be_left_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    # Classes by name are not read, and no images are lost by that.
    (tmp_path / "labels.csv").write_text("name,label", encoding="utf-8")
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


@pytest.mark.parametrize("name", ["", " "])
def test_data_without_a_name_are_not_the_folder_that_we_are_in(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.md").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert list(documents(".")) == ["mine"]
    with pytest.raises(InputError, match="the data have no name: wanted a file, a folder or a Hub data set"):
        list(documents(name))


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
    assert in_common(train, held, images=False) == str(tmp_path / "held" / "c.txt")
    assert in_common(train, f"{held}/d.txt", images=False) == ""
    assert in_common(train, "some/set", images=False) == ""
    for name in ("train/e.txt", "held/e.txt"):
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "held" / "c.txt").unlink()
    # Files without anything are no data, nor is what is not read.
    for name in ("train/.hidden", "held/.hidden", "train/LICENSE", "held/LICENSE"):
        (tmp_path / name).write_text("the same", encoding="utf-8")
    assert in_common(train, held, images=False) == ""
    told = shared_files(Data(train=f"{train}/a.txt", validation=train, test=held), images=False)
    assert told == ["data.train and data.validation have 'a.txt' in common: what is measured there was learned"]
