"""Calibration data: text files, folders, parquet, jsonl or a Hub data set as packed token ids; images for ViT.

What is read is spread over the data: documents in a random order, and one piece of each before a second of any, because
the first thousands of tokens of a data set are often one book. The order depends on the data alone, so that two
processes can share the batches and a resumed run sees the same ones. Every batch is a full rectangle, without padding.
"""

from __future__ import annotations

import io
import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.config import SourceConfig
from anysize.errors import InputError, joined
from anysize.io.reader import Checkpoint, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from anysize.calibration.scores import Record

Batch = dict[str, torch.Tensor]
_TEXT = {".txt": "text", ".md": "text", ".py": "text", ".parquet": "parquet", ".jsonl": "json", ".json": "json"}
_PREFERRED = ("text", "content")
# Rows are shuffled within a window of so many, in which long documents count as several rows.
_WINDOW = 1000
_LONGEST = 1 << 16
_NEAR = 256
# A piece is about so many sequences long: few enough to be spread, long enough to be a text.
_SEQUENCES_A_PIECE, _CHARACTERS_A_TOKEN, _SHORTEST = 4, 4, 4096


@dataclass(frozen=True)
class DataOptions:
    """How much of the data is read, and in what shape.

    tokens: at most so many in all. sequence_length: tokens of one sequence. batch_size: sequences of one batch.
    column: the text column where there are several.
    """

    tokens: int = 131_072
    sequence_length: int = 256
    batch_size: int = 8
    column: str = ""


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(p for p in path.rglob("*") if p.suffix in _TEXT and p.is_file())
    if not found:
        raise InputError(f"the data folder '{path}' holds no {', '.join(_TEXT)} file")
    return found


Row = dict[str, Any]


def _rows(data: str) -> Iterator[Row]:
    """Return the rows of a file, folder or Hub data set, streamed, in a random order that is always the same."""
    path = Path(data).expanduser()
    if path.exists():
        files = _files(path)
        random.Random(0).shuffle(files)
        return _shuffled(itertools.chain.from_iterable(_file_rows(file) for file in files))
    if data.count("/") > 1 or data.startswith((".", "~")) or path.suffix in _TEXT:
        raise InputError(f"the data '{data}' do not exist")
    from datasets import load_dataset  # noqa: PLC0415

    try:
        found: Any = load_dataset(data, split="train", streaming=True)
        # A buffer of one row: its files are shuffled here, its rows below.
        return _shuffled(found.shuffle(seed=0, buffer_size=1))
    except Exception as error:  # whatever a Hub data set raises, the user needs one sentence
        raise InputError(f"the data '{data}' are no file or folder, and no Hub data set: {error}") from error


def _shuffled(rows: Iterable[Row]) -> Iterator[Row]:
    """Yield rows in a random order: each changes places with one of the window before it."""
    generator = random.Random(0)
    window: list[Row] = []
    for row in rows:
        if len(window) < _WINDOW:
            window.append(row)
            continue
        place = generator.randrange(_WINDOW)
        yield window[place]
        window[place] = row
    generator.shuffle(window)
    yield from window


def _file_rows(file: Path) -> Iterator[Row]:
    kind = _TEXT.get(file.suffix)
    if kind is None:
        raise InputError(f"the data file '{file}' is none of {', '.join(_TEXT)}")
    if kind == "text":
        try:
            yield {"text": file.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the data file '{file}' as text: {error}") from error
        return
    try:
        yield from _parquet_rows(file) if kind == "parquet" else _json_rows(file)
    except Exception as error:  # pyarrow and json each raise their own for a damaged file
        raise InputError(f"cannot read the data file '{file}': {' '.join(str(error).split())[:200]}") from error


def _parquet_rows(file: Path) -> Iterator[Row]:
    from pyarrow import parquet  # noqa: PLC0415

    with parquet.ParquetFile(file) as opened:
        groups = list(range(opened.num_row_groups))
        random.Random(0).shuffle(groups)
        for batch in opened.iter_batches(batch_size=64, row_groups=groups):
            yield from batch.to_pylist()


def _json_rows(file: Path) -> Iterator[Row]:
    from datasets import load_dataset  # noqa: PLC0415

    yield from load_dataset("json", data_files=str(file), split="train", streaming=True)  # pyright: ignore[reportReturnType]


def _text_column(row: dict[str, Any], wanted: str, data: str) -> str:
    texts = [name for name, value in row.items() if isinstance(value, str)]
    if wanted:
        if wanted not in texts:
            raise InputError(f"the data '{data}' have no text column '{wanted}': they have {joined(texts) or 'none'}")
        return wanted
    for name in (*_PREFERRED, *(texts if len(texts) == 1 else ())):
        if name in texts:
            return name
    images = [name for name, value in row.items() if isinstance(value, (dict, bytes)) or hasattr(value, "convert")]
    kind = f"images ({joined(images)}), and this model reads text" if images else f"columns {joined(row)}"
    raise InputError(f"the data '{data}' have no text column: they have {kind}; name one with --column")


def documents(data: str, column: str = "") -> Iterator[str]:
    """Yield the texts of a file, folder or Hub data set, one after the other; raise InputError where there is none."""
    found = ""
    for row in _rows(data):
        found = found or _text_column(row, column, data)
        yield row[found] or ""


def _cuts(text: str, size: int) -> list[int]:
    """Return where a text is cut into pieces of about a size: before a blank where one is near, so no word is split."""

    def moved(at: int) -> int:
        near = range(at, min(at + _NEAR, len(text)))
        return next((i for i in near if text[i].isspace()), at if at + _NEAR < len(text) else len(text))

    return sorted({0, len(text), *map(moved, range(size, len(text), size))})


def _long_rows_split(rows: Iterable[Row], column: str) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its document ends with it)."""
    for row in rows:
        text: str = row[column] or ""
        for start, stop in itertools.pairwise(_cuts(text, _LONGEST)):
            yield text[start:stop], stop == len(text)


def pieces(data: str, options: DataOptions) -> Iterator[tuple[str, bool]]:
    """Yield (text, whether its document ends there): one piece of every document, then a second of the longer ones, ...

    Raises InputError where there are no data or no text column. All of the data come, once, where a reader goes on.
    """
    size = max(_SHORTEST, options.sequence_length * _SEQUENCES_A_PIECE * _CHARACTERS_A_TOKEN)
    rows = _rows(data)
    first = next(rows, None)
    if first is None:
        raise InputError(f"the data '{data}' are empty")
    column = _text_column(first, options.column, data)
    for turn in range(_LONGEST // size + 2):
        for number, (text, last) in enumerate(_long_rows_split(_rows(data), column)):
            cuts = _cuts(text, size)
            count = len(cuts) - 1
            if turn < count:
                # Another place in every document, so that not all that is read is beginnings.
                piece = (number + turn) % count
                yield text[cuts[piece] : cuts[piece + 1]], last and piece + 1 == count


def token_batches(
    data: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, options: DataOptions
) -> Iterator[Batch]:
    """Yield {input_ids: int64 [batch, sequence]}, pieces packed one after the other, an end token after each document.

    Raises InputError where there are no data, too few for one sequence, or ids that the model does not have.
    """
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
        if left < per_batch:
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


def image_batches(data: str, image_size: int, num_channels: int, options: DataOptions) -> Iterator[Batch]:
    """Yield {pixel_values: float32 [batch, channels, size, size]} in -1..1, resized where they are of another size.

    `options.tokens` counts images here. Raises InputError where the data hold no images.
    """
    from PIL import Image  # noqa: PLC0415

    waiting: list[torch.Tensor] = []
    made = 0
    for row in _rows(data):
        if made + len(waiting) == options.tokens:
            break
        value = next((v for v in row.values() if isinstance(v, dict | bytes) or hasattr(v, "convert")), None)
        raw = value.get("bytes") if isinstance(value, dict) else value
        if raw is None:
            raise InputError(f"the data '{data}' hold no images, and this model reads images: columns {joined(row)}")
        image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
        image = image.convert("L" if num_channels == 1 else "RGB").resize((image_size, image_size))
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float() / 127.5 - 1
        waiting.append(pixels.reshape(image_size, image_size, num_channels).permute(2, 0, 1))
        if len(waiting) == options.batch_size:
            yield {"pixel_values": torch.stack(waiting)}
            made, waiting = made + len(waiting), []
    if waiting:
        yield {"pixel_values": torch.stack(waiting)}
    elif not made:
        raise InputError(f"the data '{data}' are empty")


def batches(data: str, config: SourceConfig, source: str, options: DataOptions) -> Iterator[Batch]:
    """Yield the batches that a model of this config reads; `source` is where its tokenizer lies."""
    if config.architecture.modality == "image":
        return image_batches(data, config.full["image_size"], config.full["num_channels"], options)
    return token_batches(data, tokenizer_of(source), config.sizes["vocab"], options)


def batches_again(record: Record, config: SourceConfig, tensors: TensorSource, *, limit: int) -> Iterator[Batch]:
    """Yield the batches that scores were made of, up to `limit` tokens (images for an image model)."""
    options = DataOptions(limit, record.sequence_length or 1, record.batch_size, record.column)
    where = str(tensors.folder) if isinstance(tensors, Checkpoint) else tensors.location
    return batches(record.data, config, where, options)


def tokenizer_of(source: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer beside a checkpoint; raise InputError where there is none."""
    from transformers import AutoTokenizer  # noqa: PLC0415

    from anysize.io.models import quiet_transformers  # noqa: PLC0415

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"'{source}' has no tokenizer that transformers can read, and text needs one: {why}"
        ) from error
