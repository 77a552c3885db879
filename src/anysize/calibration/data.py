"""Calibration data: text files, folders, parquet, jsonl or a Hub data set as packed token ids; images for ViT.

What is read is spread over the data: documents in a random order, and one piece of each before a second of any, because
the first thousands of tokens of a data set are often one book. The order depends on the data alone, so that two
processes can share the batches and a resumed run sees the same ones. Every batch is a full rectangle, without padding.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.config import SourceConfig
from anysize.errors import InputError
from anysize.io.data_files import Row, cuts
from anysize.io.image_processor import ImageProcessor, image_processor_of
from anysize.io.models import tokenizer_of
from anysize.io.pictures import class_of, picture
from anysize.io.reader import Checkpoint, TensorSource
from anysize.io.rows import documents, rows, text_column, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anysize.calibration.scores import Record

__all__ = [
    "Batch",
    "DataOptions",
    "batches",
    "batches_again",
    "batches_of_labels",
    "default_items",
    "default_length",
    "documents",
    "image_batches",
    "labelled_batches",
    "located",
    "num_places",
    "pieces",
    "sampled",
    "token_batches",
    "tokenizer_of",
    "tokenizer_place",
]  # fmt: skip

Batch = dict[str, torch.Tensor]
_LONGEST = 1 << 16
# A piece is about so many sequences long: few enough to be spread, long enough to be a text.
_SEQUENCES_A_PIECE, _CHARACTERS_A_TOKEN, _SHORTEST = 4, 4, 4096
# What tells data apart: so many of the first tokens, or images. Whoever reads data again reads more.
_SAMPLE_TOKENS, _SAMPLE_IMAGES = 16_384, 64


# Of an image model that nobody says a number for.
IMAGES = 2_048


@dataclass(frozen=True)
class DataOptions:
    """How much of the data is read, and in what shape.

    tokens: at most so many in all. sequence_length: tokens of one sequence. batch_size: sequences of one batch.
    column: the column of the text, or of the images, where there are several. label_column: of the images' classes.
    """

    tokens: int = 131_072
    sequence_length: int = 256
    batch_size: int = 8
    column: str = ""
    label_column: str = "label"


def _long_rows_split(read: Iterable[Row], column: str, data: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its document ends with it)."""
    for row in read:
        text = text_of(row, column, data)
        for start, stop in itertools.pairwise(cuts(text, _LONGEST)):
            yield text[start:stop], stop == len(text)


def pieces(data: str, options: DataOptions) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its document ends there): one piece of every document, then a second of the longer ones, ...

    Raises InputError where there are no data, or no text in a row. All of the data come, once, where a reader goes on.
    """
    size = max(_SHORTEST, options.sequence_length * _SEQUENCES_A_PIECE * _CHARACTERS_A_TOKEN)
    column, _ = text_column(rows(data), options.column, data)
    if not column:
        raise InputError(f"the data '{data}' are empty")
    for turn in range(_LONGEST // size + 2):
        for number, (text, last) in enumerate(_long_rows_split(rows(data), column, data)):
            places = cuts(text, size)
            count = len(places) - 1
            if turn < count:
                # Another place in every document, so that not all that is read is beginnings.
                piece = (number + turn) % count
                yield text[places[piece] : places[piece + 1]], last and piece + 1 == count


def token_batches(
    data: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, options: DataOptions
) -> Iterator[Batch]:
    """Yield {input_ids: int64 [batch, sequence]}, pieces packed one after the other, an end token after each document.

    Raises InputError where there are no data, too few for one sequence, or ids that the model does not have.
    """
    if options.tokens < options.sequence_length:
        raise InputError(
            f"{options.tokens} tokens are less than one sequence of {options.sequence_length}: give more --tokens or a "
            "smaller --sequence-length"
        )
    end: Any = tokenizer.eos_token_id
    waiting: list[int] = []
    per_batch = options.batch_size * options.sequence_length
    left, made = options.tokens, 0
    for text, last in pieces(data, options):
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        waiting += [*ids, end] if last and end is not None else ids
        while len(waiting) >= per_batch and left >= per_batch:
            yield _checked(waiting[:per_batch], options.sequence_length, vocab_size)
            waiting, left, made = waiting[per_batch:], left - per_batch, made + per_batch
        # What is left is less than a batch, or waiting is: a last batch is shorter, and read to its end all the same.
        if len(waiting) >= left // options.sequence_length * options.sequence_length:
            break
    rest = min(len(waiting), left) // options.sequence_length * options.sequence_length
    if rest:
        yield _checked(waiting[:rest], options.sequence_length, vocab_size)
    elif not made:
        raise InputError(
            f"the data '{data}' hold {len(waiting):,} tokens, too few for one sequence of {options.sequence_length}: "
            "give more data or a smaller --sequence-length"
        )


def _checked(ids: list[int], length: int, vocab_size: int) -> Batch:
    batch = torch.tensor(ids).reshape(-1, length)
    highest = int(batch.max())
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer gives id {highest}, the model has {vocab_size} tokens: this tokenizer is not the model's"
        )
    return {"input_ids": batch}


def image_batches(data: str, processor: ImageProcessor, options: DataOptions) -> Iterator[Batch]:
    """Yield {pixel_values: float32 [batch, channels, size, size]}, prepared as the processor does it.

    `options.tokens` counts images here. Raises InputError where the data hold no images.
    """
    for some in _batched_rows(data, options):
        yield {"pixel_values": _pixels(some, data, processor, options)}


def labelled_batches(data: str, config: SourceConfig, source: str, options: DataOptions) -> Iterator[Batch]:
    """Yield the batches of images that `batches` yields, with {labels: int64 [batch]}: the class of each image.

    Raises InputError where there are no labels, or some that the model does not have.
    """
    processor = image_processor_of(source, config)
    for some in _batched_rows(data, options):
        labels = _labels(some, data, config, source, options)
        yield {"pixel_values": _pixels(some, data, processor, options), "labels": torch.tensor(labels)}


def batches_of_labels(data: str, config: SourceConfig, source: str, options: DataOptions) -> Iterator[list[int]]:
    """Yield the labels of the batches that `labelled_batches` yields, without making pixels of any image.

    Raises InputError as it does for labels.
    """
    for some in _batched_rows(data, options):
        yield _labels(some, data, config, source, options)


def _labels(some: Iterable[Row], data: str, config: SourceConfig, source: str, options: DataOptions) -> list[int]:
    classes, column = config.sizes["label"], options.label_column
    return [class_of(row, data, column, "--label-column", num_classes=classes, model=source) for row in some]


def _batched_rows(data: str, options: DataOptions) -> Iterator[list[Row]]:
    read, made = itertools.islice(rows(data, images=True), options.tokens), 0
    while some := list(itertools.islice(read, options.batch_size)):
        yield some
        made += 1
    if not made:
        raise InputError(f"the data '{data}' are empty")


def _pixels(some: Iterable[Row], data: str, processor: ImageProcessor, options: DataOptions) -> torch.Tensor:
    images = (picture(row, data, options.column) for row in some)
    return torch.stack([processor.pixels(processor.stored(image, data)) for image in images])


def batches(data: str, config: SourceConfig, source: str, options: DataOptions) -> Iterator[Batch]:
    """Yield the batches that a model of this config reads; `source` is where its tokenizer or image processor lies."""
    if config.architecture.modality == "image":
        return image_batches(data, image_processor_of(source, config), options)
    return token_batches(data, tokenizer_of(source), config.sizes["vocab"], options)


def num_places(config: SourceConfig, sequence_length: int) -> int:
    """Return how many tokens a sequence has; of an image its patches, and the place of its class."""
    if config.architecture.modality == "image":
        return 1 + (config.full["image_size"] // config.full["patch_size"]) ** 2
    return sequence_length


def default_items(config: SourceConfig) -> int:
    """Return how many tokens, or images, are read where nobody says: an image is many samples."""
    return IMAGES if config.architecture.modality == "image" else DataOptions().tokens


def default_length(config: SourceConfig) -> int:
    """Return how long sequences are where nobody says: as ever, or as long as the model has positions for."""
    length = DataOptions().sequence_length
    if config.architecture.modality == "image" or config.num_positions is None:
        return length
    return min(length, config.num_positions)


def located(place: str) -> str:
    """Return the absolute path of what lies on this machine, so that it is found from any folder; a Hub id as it is."""
    path = Path(place).expanduser()
    return str(path.absolute()) if place and path.exists() else place


def tokenizer_place(tensors: TensorSource, named: str = "") -> str:
    """Return where a source's tokenizer (or image processor) lies: the place that was named, or beside it."""
    return named or (str(tensors.folder) if isinstance(tensors, Checkpoint) else tensors.location)


def sampled(read: Iterator[Batch], most: int) -> tuple[str, Iterator[Batch]]:
    """Return a hash of the first of `most` tokens (or images), and all batches, those that were hashed included.

    It depends on the data and the tokenizer (of images on how they are prepared), not on how they are shared between
    batches.
    """
    digest, first, seen = hashlib.sha256(), list[Batch](), 0
    for batch in read:
        first.append(batch)
        text = "input_ids" in batch
        items = batch["input_ids"].flatten() if text else batch["pixel_values"]
        limit = min(most, _SAMPLE_TOKENS if text else _SAMPLE_IMAGES)
        digest.update(items[: limit - seen].contiguous().numpy().data)
        seen += len(items)
        if seen >= limit:
            break
    return digest.hexdigest(), itertools.chain(first, read)


def batches_again(record: Record, config: SourceConfig, tensors: TensorSource, *, limit: int) -> Iterator[Batch]:
    """Yield the batches that scores were made of, up to `limit` tokens (images for an image model).

    Raises InputError where the data, or what the tokenizer makes of them, are no longer the same.
    """
    length = record.sequence_length or 1
    options = DataOptions(max(limit, length), length, record.batch_size, record.column)
    where = tokenizer_place(tensors, record.tokenizer)
    found, read = sampled(batches(record.data, config, where, options), record.tokens)
    if found != record.data_sha256:
        image = config.architecture.modality == "image"
        how = "prepared as images are beside '{}'," if image else "as the tokenizer of '{}' spells them,"
        raise InputError(
            f"the data '{record.data}', {how.format(where)} are not those that the scores were made of: calibrate "
            "again, or put back what changed"
        )
    yield from read
