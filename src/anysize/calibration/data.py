"""Calibration data: text files, folders, parquet, jsonl or a Hub data set as packed token ids; images for ViT.

Every batch is a full rectangle (no padding), in an order that depends on the data alone, so that two processes can
share the batches and a resumed run sees the same ones.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
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


def _rows(data: str) -> Iterator[dict[str, Any]]:
    """Return the rows of a file, folder or Hub data set, streamed."""
    from datasets import load_dataset  # noqa: PLC0415

    path = Path(data).expanduser()
    if not path.exists():
        if data.count("/") > 1 or data.startswith((".", "~")) or path.suffix in _TEXT:
            raise InputError(f"the data '{data}' do not exist")
        try:
            return iter(load_dataset(data, split="train", streaming=True))  # pyright: ignore[reportReturnType, reportArgumentType]
        except Exception as error:  # whatever a Hub data set raises, the user needs one sentence
            raise InputError(f"the data '{data}' are no file or folder, and no Hub data set: {error}") from error
    return itertools.chain.from_iterable(_file_rows(file) for file in _files(path))


def _file_rows(file: Path) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset  # noqa: PLC0415

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
        yield from load_dataset(kind, data_files=str(file), split="train", streaming=True)  # pyright: ignore[reportReturnType]
    except InputError:
        raise
    except Exception as error:  # pyarrow and json each raise their own for a damaged file
        raise InputError(f"cannot read the data file '{file}': {' '.join(str(error).split())[:200]}") from error


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


def token_batches(
    data: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int, options: DataOptions
) -> Iterator[Batch]:
    """Yield {input_ids: int64 [batch, sequence]}, documents packed one after the other with the end token between.

    Raises InputError where there are no data, too few for one sequence, or ids that the model does not have.
    """
    end: Any = tokenizer.eos_token_id
    waiting: list[int] = []
    per_batch = options.batch_size * options.sequence_length
    left, column, made = options.tokens, "", 0
    for row in _rows(data):
        column = column or _text_column(row, options.column, data)
        ids: Any = tokenizer(row[column] or "", add_special_tokens=False, verbose=False)["input_ids"]
        waiting += ids if end is None else [*ids, end]
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
