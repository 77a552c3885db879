"""Text as packed sequences: tokenized once and kept on disk, or read while training.

Documents follow one another with an end token between them and are cut into sequences of one length, so that no place
of a batch is padding. What is kept is found again under the data's files, the tokenizer and how much was read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

from anysize.errors import InputError
from anysize.io.cache import MOVE_CACHE, cache_folder
from anysize.io.data_identity import data_identity
from anysize.io.rows import documents
from anysize.io.whole import read_json, told_of_disk, write_json
from anysize.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Example = dict[str, torch.Tensor]

_DOCUMENTS_AT_ONCE = 64
# A document is cut here before it is tokenized, so that one of any length takes little memory.
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Packed:
    """Tokens on disk: ids, and how many bytes of UTF-8 text they stand for (end tokens stand for none)."""

    path: Path
    num_tokens: int
    num_bytes: int
    dtype: str

    @property
    def ids(self) -> np.ndarray[Any, Any]:
        """All ids, memory-mapped."""
        return np.memmap(self.path, self.dtype, "r", shape=(self.num_tokens,))

    @property
    def bits_per_byte(self) -> float:
        """What a loss in nats/token is multiplied by to be bits/byte of this text."""
        return self.num_tokens / self.num_bytes / math.log(2)


def _encoded(data: str, column: str, tokenizer: PreTrainedTokenizerBase, split: str) -> Iterator[tuple[list[int], int]]:
    """Yield (ids, bytes) of one document after the other, an end token after each; an empty row is no document."""
    end: Any = tokenizer.eos_token_id
    waiting: list[tuple[str, bool]] = []

    def flush() -> Iterator[tuple[list[int], int]]:
        texts = [text for text, _ in waiting]
        found: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        for ids, (text, last) in zip(found, waiting, strict=True):
            yield [*ids, end] if last and end is not None else list(ids), len(text.encode("utf-8", "replace"))
        waiting.clear()

    for text in documents(data, column, split=split):
        for start in range(0, len(text), _LONGEST):
            waiting.append((text[start : start + _LONGEST], start + _LONGEST >= len(text)))
            if len(waiting) == _DOCUMENTS_AT_ONCE or start:
                yield from flush()
        if len(waiting) >= _DOCUMENTS_AT_ONCE:
            yield from flush()
    yield from flush()


def _refuse_foreign(ids: list[int], vocab_size: int) -> None:
    if ids and (highest := max(ids)) >= vocab_size:
        raise InputError(
            f"the tokenizer gives id {highest}, the model has {vocab_size} tokens: this tokenizer is not the model's"
        )


def _refuse_empty(data: str, num_bytes: int) -> None:
    """Refuse end tokens alone: nothing is learned of them, and they have no bytes that bits could be counted by."""
    if not num_bytes:
        raise InputError(f"the data '{data}' hold no text: every document that was read is empty")


def packed(
    data: str, column: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_tokens: int | None,
    progress: Progress, *, split: str = "train",
) -> Packed:  # fmt: skip
    """Return the data as tokens on disk, at most so many; what was tokenized before is found again.

    split: the part of a Hub data set; files have none.

    Raises InputError where there are no data, or where the tokenizer gives ids that the model does not have.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else repr(tokenizer)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    key = json.dumps([data_identity(data), split, column, spelled, tokenizer.eos_token_id, max_tokens, dtype, 4])
    home = cache_folder() / "tokens" / hashlib.sha256(key.encode()).hexdigest()[:24]
    record, place = home / "made.json", home / f"ids.{dtype}"
    if record.is_file():
        made = read_json(record, "num_tokens", "num_bytes", "max_id")
        if max_id := made["max_id"]:
            _refuse_foreign([max_id], vocab_size)
        _refuse_empty(data, made["num_bytes"])
        return Packed(place, made["num_tokens"], made["num_bytes"], dtype)
    with told_of_disk(f"cannot keep the tokens of '{data}' in '{home}'", MOVE_CACHE):
        home.mkdir(parents=True, exist_ok=True)
        writing = home / f"ids.{os.getpid()}"
        num_tokens = num_bytes = max_id = 0
        try:
            with writing.open("wb") as file:
                for ids, size in _encoded(data, column, tokenizer, split):
                    _refuse_foreign(ids, vocab_size)
                    if max_tokens is not None and num_tokens + len(ids) >= max_tokens:
                        kept = max_tokens - num_tokens
                        # The bytes of a part, by its share of the tokens.
                        size, ids = round(size * kept / len(ids)), ids[:kept]
                    file.write(np.array(ids, dtype).tobytes())
                    num_tokens, num_bytes = num_tokens + len(ids), num_bytes + size
                    max_id = max(max_id, *ids) if ids else max_id
                    progress("tokens", num_tokens, max_tokens or 0)
                    if num_tokens == max_tokens:
                        break
            _refuse_empty(data, num_bytes)
            writing.replace(place)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise
        write_json(record, {"num_tokens": num_tokens, "num_bytes": num_bytes, "max_id": max_id})
    return Packed(place, num_tokens, num_bytes, dtype)


class Sequences(Dataset[Example]):
    """Packed tokens as sequences of one length: {input_ids, labels: int64 [sequence]}, and its `sequence` number.

    Raises InputError where there are fewer than `least` of them.
    """

    def __init__(self, tokens: Packed, length: int, *, least: int, data: str) -> None:
        self.tokens, self.length = tokens, length
        self._ids = tokens.ids
        if len(self) < least:
            raise InputError(
                f"the data '{data}' hold {tokens.num_tokens:,} tokens, {len(self)} sequences of {length}; wanted at "
                f"least {least}, one step: give more data, shorter sequences or a smaller batch"
            )

    def __len__(self) -> int:
        return self.tokens.num_tokens // self.length

    def __getitem__(self, index: int) -> Example:
        ids = torch.from_numpy(self._ids[index * self.length : (index + 1) * self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone(), "sequence": torch.tensor(index)}


class StreamedSequences(IterableDataset[Example]):
    """Sequences made of the data while they are read, again and again: nothing is kept, and there is no end.

    So that a stopped run finds where it was however often the data were read by then. Raises InputError, while it is
    read, where the data do not make one sequence.
    """

    def __init__(
        self, data: str, column: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, length: int
    ) -> None:
        self.data, self.column, self.tokenizer = data, column, tokenizer
        self.vocab_size, self.length = vocab_size, length

    def __iter__(self) -> Iterator[Example]:
        while True:
            yield from self._once()

    def _once(self) -> Iterator[Example]:
        waiting: list[int] = []
        whole, num_bytes = False, 0
        for ids, size in _encoded(self.data, self.column, self.tokenizer, "train"):
            _refuse_foreign(ids, self.vocab_size)
            num_bytes += size
            waiting += ids
            while len(waiting) >= self.length:
                made = torch.tensor(waiting[: self.length])
                waiting, whole = waiting[self.length :], True
                yield {"input_ids": made, "labels": made.clone()}
        _refuse_empty(self.data, num_bytes)
        if not whole:
            raise InputError(
                f"the data '{self.data}' hold {len(waiting):,} tokens, too few for one sequence of {self.length}: give "
                "more data or shorter sequences"
            )


def stacked(examples: list[Example]) -> Example:
    """Return examples as one batch."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
