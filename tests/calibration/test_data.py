"""What calibration reads of its data: all of them once where they are few, a bit of everything where they are many."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from pyarrow import Table, parquet

from anysize.calibration.data import DataOptions, pieces, token_batches, tokenizer_of
from anysize.errors import InputError
from anysize.io import rows as rows_module
from anysize.io.rows import documents, rows

SHORT = DataOptions(sequence_length=8)


def _jsonl(folder: Path, texts: list[str]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _words(number: int) -> str:
    return " ".join(f"w{number}.{i}" for i in range(20_000))


@pytest.mark.parametrize("blank", [" ", ""], ids=["with blanks", "without any blank"])
def test_every_character_is_read_once_and_every_document_ends_once(tmp_path: Path, blank: str) -> None:
    texts = [blank.join(f"{n}.{i}" for i in range(length)) for n, length in enumerate((3, 900, 40_000, 1))]

    found = list(pieces(str(_jsonl(tmp_path, texts)), SHORT))

    assert Counter("".join(text for text, _ in found)) == Counter("".join(texts))
    assert sum(last for _, last in found) == len(texts)
    assert max(len(text) for text, _ in found) < 4096 + 512


def test_no_word_is_split(tmp_path: Path) -> None:
    words = _words(0).split()

    found = [word for text, _ in pieces(str(_jsonl(tmp_path, [" ".join(words)])), SHORT) for word in text.split()]

    assert Counter(found) == Counter(words)
    assert found != words, "the pieces come in the order of the text: nothing was spread"


def test_what_is_read_first_comes_from_every_document(tmp_path: Path) -> None:
    data = _jsonl(tmp_path, [_words(number) for number in range(12)])

    chunks = {text.split()[1].partition(".")[0] for text, _ in list(pieces(str(data), SHORT))[:36]}

    assert len(chunks) == 12, "36 pieces in, some documents have not been read"


def test_the_order_is_the_same_every_time_and_follows_the_data(tmp_path: Path) -> None:
    data = _jsonl(tmp_path, [str(number) for number in range(50)])
    first = [text for text, _ in pieces(str(data), SHORT)]

    assert first == [text for text, _ in pieces(str(data), SHORT)]
    assert first != sorted(first, key=int), "documents come in their order in the file"


def test_rows_that_lie_class_by_class_are_mixed(tmp_path: Path) -> None:
    labels = [row // 3_000 for row in range(30_000)]
    parquet.write_table(Table.from_pydict({"label": labels}), tmp_path / "rows.parquet", row_group_size=1_000)
    found = [row["label"] for row in rows(str(tmp_path / "rows.parquet"))]
    assert sorted(found) == labels
    assert found == [row["label"] for row in rows(str(tmp_path / "rows.parquet"))]
    first = [found[:500].count(label) for label in range(10)]
    assert min(first) > 20
    assert [row["label"] for row in rows(str(tmp_path / "rows.parquet"), ordered=True)] == labels


def test_files_of_a_folder_are_mixed(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(str(number), encoding="utf-8")

    found = [int(text) for text, _ in pieces(str(tmp_path), SHORT)]

    assert sorted(found) == list(range(30))
    assert found != sorted(found)


def test_a_long_text_file_is_several_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"w{i}" for i in range(5_000))
    (tmp_path / "a.txt").write_text(words, encoding="utf-8")
    monkeypatch.setattr("anysize.io.data_files._FILE_CHARACTERS", 1_000)
    found = [row["text"] for row in rows(str(tmp_path / "a.txt"), ordered=True)]
    assert "".join(found) == words
    assert {len(text) // 100 for text in found[:-1]} == {10}
    assert all(text.startswith(" w") for text in found[1:])


def test_the_window_holds_fewer_rows_where_they_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text(f"{number:>100}", encoding="utf-8")
    read: list[str] = []
    whole = rows_module.file_rows
    monkeypatch.setattr(rows_module, "file_rows", lambda file, **k: (read.append(file.name), whole(file, **k))[1])
    monkeypatch.setattr("anysize.io.rows._WINDOW_CHARACTERS", 500)
    found = rows(str(tmp_path))
    first = next(found)
    assert len(read) == 6
    assert sorted(int(row["text"]) for row in [first, *found]) == list(range(30))


def test_what_is_about_a_table_is_not_read_with_it(tmp_path: Path) -> None:
    script = f"{tmp_path.name}.py"
    for name in ("README.md", script, "a.txt", "code.py"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert {row["text"] for row in rows(str(tmp_path))} == {"README.md", "a.txt", "code.py", script}
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "row"}) + "\n", encoding="utf-8")
    assert {row["text"] for row in rows(str(tmp_path))} == {"a.txt", "code.py", "row"}


def test_hidden_files_and_byte_order_marks_are_no_text_and_endings_may_be_large(tmp_path: Path) -> None:
    for name in (".git/config.txt", "._a.txt", "b.TXT", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8-sig")
    assert {row["text"] for row in rows(str(tmp_path))} == {"b.TXT", "sub/c.txt"}
    # A folder that is named is read, whatever it is called.
    assert [row["text"] for row in rows(str(tmp_path / ".git"))] == [".git/config.txt"]
    assert [row["text"] for row in rows(str(tmp_path / "b.TXT"))] == ["b.TXT"]


def test_a_row_without_the_text_column_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w3 w4", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"content": "w5 w6"}) + "\n", encoding="utf-8")
    (tmp_path / "n.jsonl").write_text(json.dumps({"text": 5}) + "\n", encoding="utf-8")

    with pytest.raises(InputError, match=r"have a row without '(text|content)': it has (text|content) \(in '"):
        list(pieces(str(tmp_path), SHORT))


def _with_nulls(folder: Path, first: dict[str, object], then: dict[str, object]) -> str:
    """Many rows and one that comes last, in whatever order they are read."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [first] * 40 + [then]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("first", "then", "column"),
    [
        ({"text": None, "title": "w3"}, {"text": "w4", "title": "w5"}, ""),
        ({"text": None}, {"text": "w4"}, ""),
        ({"story": None, "n": 1}, {"story": "w4", "n": 2}, ""),
        ({"text": None}, {"text": "w4"}, "text"),
        ({"story": None, "title": "w3"}, {"story": "w4", "title": "w5"}, "story"),
    ],
    ids=["text beside another", "text alone", "the only text", "text by name", "another by name"],
)
def test_a_null_in_the_first_row_does_not_take_the_text_away(
    tmp_path: Path, first: dict[str, object], then: dict[str, object], column: str
) -> None:
    data = _with_nulls(tmp_path, first, then)
    assert "".join(text for text, _ in pieces(data, DataOptions(sequence_length=8, column=column))) == "w4"
    for ordered in (False, True):
        assert sorted(documents(data, column, ordered=ordered)) == [""] * 40 + ["w4"]


def test_a_null_is_no_reason_to_take_another_column(tmp_path: Path) -> None:
    data = _with_nulls(tmp_path, {"story": None, "title": "w3"}, {"story": "w4", "title": "w5"})
    for read in (lambda: list(pieces(data, SHORT)), lambda: list(documents(data))):
        with pytest.raises(InputError, match=r"they have columns story \(text\), title \(text\); name one with --co"):
            read()


def test_data_without_any_text_are_refused_though_a_null_may_be_one(tmp_path: Path) -> None:
    data = _with_nulls(tmp_path, {"story": None, "n": 1}, {"story": None, "n": 1})
    with pytest.raises(InputError, match=r"they have columns story \(nothing but nulls\), n \(int\)"):
        list(pieces(data, SHORT))


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (DataOptions(tokens=128, sequence_length=16, batch_size=64), [8]),
        (DataOptions(tokens=100, sequence_length=16, batch_size=4), [4, 2]),
        (DataOptions(tokens=128, sequence_length=16, batch_size=4), [4, 4]),
        (DataOptions(tokens=10_000, sequence_length=16, batch_size=8), [8, 7]),
    ],
    ids=["less than a batch", "a shorter last batch", "whole batches", "all of the data"],
)
def test_as_many_tokens_are_read_as_are_asked_for(
    llama: Path, tmp_path: Path, options: DataOptions, rows: list[int]
) -> None:
    # Each document is two tokens and its end.
    data = _jsonl(tmp_path, [f"w{3 + n % 50} w4" for n in range(80)])

    found = [len(batch["input_ids"]) for batch in token_batches(str(data), tokenizer_of(str(llama)), 61, options)]

    assert found == rows


def test_fewer_tokens_than_one_sequence_are_refused_by_their_number(llama: Path, text: Path) -> None:
    with pytest.raises(InputError, match="16 tokens are less than one sequence of 64: give more --tokens or a smaller"):
        list(token_batches(str(text), tokenizer_of(str(llama)), 61, DataOptions(tokens=16, sequence_length=64)))


@pytest.mark.parametrize("ending", ["jsonl", "json"])
@pytest.mark.parametrize("place", ["b[1].{}", "d [1]/x.{}", "b*.{}", "b?.{}"])
def test_a_name_that_reads_as_a_pattern_is_the_name_of_one_file(tmp_path: Path, place: str, ending: str) -> None:
    data = tmp_path / place.format(ending)
    data.parent.mkdir(exist_ok=True)
    (tmp_path / f"b1.{ending}").write_text('{"text": "another"}\n')
    data.write_text('{"text": "this one"}\n')
    assert list(documents(str(data))) == ["this one"]


def test_an_empty_shard_has_no_rows(tmp_path: Path) -> None:
    _jsonl(tmp_path, ["one", "two"])
    for name in ("empty.jsonl", "another.json"):
        (tmp_path / name).write_bytes(b"")
    assert sorted(documents(str(tmp_path))) == ["one", "two"]
    with pytest.raises(InputError, match="are empty"):
        list(pieces(str(tmp_path / "empty.jsonl"), SHORT))
