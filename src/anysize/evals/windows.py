"""Text as windows of tokens to predict: every token once, document by document, in the order of the data.

Every window begins with the tokenizer's beginning-of-text token, or its end-of-text token where it has no other. All
but the first of a document go on with the last tokens of the one before, a quarter of a window, as context that is not
predicted again: a model asked for the middle of a text knows that it is one. No window spans two documents, and nothing
but tokens of the text is predicted, so that nats can be told per byte as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from anysize.errors import InputError
from anysize.io.data_files import cuts
from anysize.io.rows import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A longer text is read as several, cut before a blank: tokenizing is not linear in memory for every tokenizer.
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Window:
    """`targets` are what comes after each of the last `len(targets)` inputs; the inputs before them are context."""

    inputs: Sequence[int]
    targets: Sequence[int]


@dataclass
class Amount:
    """How much has been read so far."""

    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0
    num_unknown_tokens: int = 0


class Speller:
    """A tokenizer as evaluation needs it: ids, the bytes that they spell, and what comes before a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
        self.tokenizer: Any = tokenizer
        self.unknown: int | None = self.tokenizer.unk_token_id
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        start = bos if bos is not None else eos
        self.start: int | None = start if start is not None and start < vocab_size else None

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def num_bytes(self, text: str, ids: Sequence[int], count: int) -> int:
        """Return how many bytes of a text its first `count` tokens spell; a character counts with its last token."""
        if count == len(ids):
            return len(text.encode())
        if count == 0:
            return 0
        if not self.tokenizer.is_fast:
            return len(self.tokenizer.decode(ids[:count]).encode())
        told = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        places = told["offset_mapping"]
        return len(text[: min(places[count - 1][1], places[count][0])].encode())


def windows_of(ids: Sequence[int], start: int | None, length: int) -> Iterator[Window]:
    """Yield windows of at most `length` inputs that predict every token of `ids` once, in order.

    Without a start token the first token is context only.
    """
    head = [] if start is None else [start]
    at = 1 - len(head)
    while at < len(ids):
        # Whatever the length, there is something before the first token that is predicted.
        context = ids[at - min(at, max(length // 4, 1 - len(head))) : at]
        targets = ids[at : at + length + 1 - len(head) - len(context)]
        yield Window([*head, *context, *targets[:-1]], targets)
        at += len(targets)


class TextReader:
    """Reads the windows of some data, up to a number of tokens, and counts what it read in `amount`."""

    def __init__(
        self,
        data: str,
        spellers: Sequence[Speller],
        *,
        column: str,
        split: str,
        tokens: int,
        length: int,
        vocab_size: int,
    ) -> None:
        self.data, self.column, self.split = data, column, split
        self.tokens, self.length, self.vocab_size = tokens, length, vocab_size
        self.speller, self.others = spellers[0], spellers[1:]
        self.amount = Amount()

    def _texts(self) -> Iterator[str]:
        for text in documents(self.data, self.column, ordered=True, split=self.split):
            for begin, end in itertools.pairwise(cuts(text, _LONGEST)):
                yield text[begin:end]

    def windows(self) -> Iterator[Window]:
        """Yield the windows in order. Raises InputError where the data hold no token to predict."""
        skipped = 0 if self.speller.start is not None else 1
        for text in self._texts():
            ids = self._checked(text)
            kept = ids[: self.tokens - self.amount.num_tokens + skipped]
            if len(kept) <= skipped:
                continue
            self.amount.num_documents += 1
            self.amount.num_tokens += len(kept) - skipped
            self.amount.num_unknown_tokens += 0 if self.speller.unknown is None else kept.count(self.speller.unknown)
            spelt = self.speller.num_bytes(text, ids, len(kept)) - self.speller.num_bytes(text, ids, skipped)
            self.amount.num_bytes += spelt
            yield from windows_of(kept, self.speller.start, self.length)
            if self.amount.num_tokens >= self.tokens:
                return
        if not self.amount.num_tokens:
            raise InputError(f"the data '{self.data}' hold no text to predict: every document is empty")

    def _checked(self, text: str) -> list[int]:
        """Return the ids of a text, which all tokenizers give and the model has."""
        ids = self.speller.ids(text)
        if ids and (highest := max(ids)) >= self.vocab_size:
            raise InputError(
                f"the tokenizer gives id {highest}, the model has {self.vocab_size} tokens: this tokenizer is not the "
                "model's"
            )
        for other in self.others:
            if other.ids(text) != ids:
                raise InputError(
                    f"the tokenizers of model and source spell '{text[:40]}' in different tokens: token by token the "
                    "two cannot be compared; evaluate each alone and compare their bits per byte"
                )
        return ids

    def batches(self, size: int) -> Iterator[list[Window]]:
        """Yield `size` windows at a time."""
        windows = self.windows()
        while batch := list(itertools.islice(windows, size)):
            yield batch


def tensors_of(batch: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Return what a model reads of windows: int64 [windows, longest], shorter ones padded on their right and masked."""
    longest = max(len(window.inputs) for window in batch)
    ids = torch.tensor([[*window.inputs, *[0] * (longest - len(window.inputs))] for window in batch])
    if all(len(window.inputs) == longest for window in batch):
        return {"input_ids": ids}
    mask = torch.tensor([[int(at < len(window.inputs)) for at in range(longest)] for window in batch])
    return {"input_ids": ids, "attention_mask": mask}
