"""Windows: every token is predicted once, from what stands before it; bytes are those of the text that is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anysize.evals.windows import Speller, TextReader, tensors_of, windows_of
from anysize.io.models import tokenizer_of

START = 1000
TEXT = "The cat é looked 😀 at that hat."


@given(st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_every_token_is_predicted_once_from_the_token_before_it(count: int, length: int, starts: bool) -> None:
    ids = list(range(count))
    windows = list(windows_of(ids, START if starts else None, length))

    assert [target for window in windows for target in window.targets] == ids[0 if starts else 1 :]
    for window in windows:
        assert 0 < len(window.targets) <= len(window.inputs) <= length
        assert (window.inputs[0] == START) == starts
        read = window.inputs[-len(window.targets) :]
        assert all(a + 1 == b or a == START for a, b in zip(read, window.targets, strict=True))


@given(st.integers(2, 200), st.integers(8, 40))
def test_later_windows_have_a_quarter_of_context(count: int, length: int) -> None:
    windows = list(windows_of(range(count), START, length))

    assert len(windows[0].targets) == min(count, length)
    for window in windows[1:]:
        context = window.inputs[: len(window.inputs) - len(window.targets) + 1]
        before = window.targets[0]
        assert list(context) == [START, *range(before - length // 4, before)]


def test_a_character_counts_with_the_last_of_its_tokens(speaking: Path) -> None:
    speller = Speller(tokenizer_of(str(speaking)), 10**6)
    ids = speller.ids(TEXT)
    counts = [speller.num_bytes(TEXT, ids, count) for count in range(len(ids) + 1)]

    assert counts[0] == 0
    assert counts[-1] == len(TEXT.encode())
    assert counts == sorted(counts)
    whole = {len(TEXT[:at].encode()) for at in range(len(TEXT) + 1)}
    assert set(counts) <= whole, "a part of a character was counted"
    assert len(ids) > len(set(counts)), "no character of this text takes several tokens: nothing was tested"


def test_a_tokenizer_without_offsets_counts_bytes_as_well() -> None:
    from transformers import ByT5Tokenizer

    speller = Speller(ByT5Tokenizer(), 10**6)
    ids = speller.ids(TEXT)

    assert [speller.num_bytes(TEXT, ids, count) for count in (0, 3, len(ids))] == [0, 3, len(TEXT.encode())]


def _reader(speller: Speller, data: Path, tokens: int, length: int = 16) -> TextReader:
    return TextReader(str(data), [speller], column="", split="test", tokens=tokens, length=length, vocab_size=10**6)


@pytest.mark.parametrize("starts", [True, False])
def test_the_limit_is_met_exactly_and_bytes_follow_it(speaking: Path, tmp_path: Path, starts: bool) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{TEXT} {number}")
    (tmp_path / "3.txt").write_text("")
    speller = Speller(tokenizer_of(str(speaking)), 10**6)
    speller.start = START if starts else None
    ids = [speller.ids(f"{TEXT} {number}") for number in range(3)]
    skipped = 0 if starts else 1
    for tokens in (1, 5, len(ids[0]), len(ids[0]) + 4, 10**6):
        reader = _reader(speller, tmp_path, tokens)
        targets = [t for window in reader.windows() for t in window.targets]

        wanted = [t for each in ids for t in each[skipped:]][:tokens]
        assert targets == wanted
        assert reader.amount.num_tokens == len(wanted)
    assert reader.amount.num_documents == 3
    spelt = sum(len(f"{TEXT} {n}".encode()) - speller.num_bytes(f"{TEXT} {n}", i, skipped) for n, i in enumerate(ids))
    assert reader.amount.num_bytes == spelt


def test_data_are_read_from_their_start_in_order(speaking: Path, tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    texts = [f"hat {number}" for number in range(300)]
    parquet.write_table(Table.from_pydict({"text": texts}), tmp_path / "rows.parquet", row_group_size=7)
    speller = Speller(tokenizer_of(str(speaking)), 10**6)

    windows = list(_reader(speller, tmp_path / "rows.parquet", 10**6).windows())

    assert [list(window.targets) for window in windows] == [speller.ids(text) for text in texts]


def test_shorter_windows_are_padded_and_masked() -> None:
    class Row:
        def __init__(self, count: int) -> None:
            self.inputs = self.targets = list(range(5, 5 + count))

    rows: Any = [Row(3), Row(1)]
    made = tensors_of(rows)
    assert made["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert tensors_of(rows[:1]).keys() == {"input_ids"}
    assert tensors_of(rows)["input_ids"].dtype == torch.int64
