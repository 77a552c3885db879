"""The data of a run: what is trained on, and what is measured on, of text or of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.config import SourceConfig
from anysize.errors import InputError, joined
from anysize.io.data_identity import in_common
from anysize.io.image_processor import image_processor_of
from anysize.io.models import tokenizer_of
from anysize.progress import Progress
from anysize.training.config import Data
from anysize.training.images import Images
from anysize.training.tokens import Sequences, StreamedSequences, packed, stacked

if TYPE_CHECKING:
    from torch.utils.data import Dataset


# What says nothing about data of a kind.
_IDLE: dict[str, tuple[str, ...]] = {
    "image": ("sequence_length", "streaming", "tokenizer"),
    "text": ("label_column", "flip"),
}


@dataclass
class Datasets:
    """Training data and held-out data by name ("validation", "test"), and how a list of examples becomes a batch.

    tokens_each: of one example (1 for an image). bits_per_byte: what a loss in nats/token is multiplied by to be
    bits/byte, by name; empty for images. num_sequences: of the training data; None where they are streamed. identity:
    of the training tokens as they are kept. end_token: what stands between documents; None where nothing does.
    """

    train: Dataset[Any]
    held_out: dict[str, Dataset[Any]]
    tokens_each: int
    num_sequences: int | None
    bits_per_byte: dict[str, float] = field(default_factory=dict)
    identity: str = ""
    end_token: int | None = None
    collate: Callable[[list[Any]], dict[str, Any]] = stacked


def shared_files(data: Data, *, images: bool) -> list[str]:
    """Return a sentence for each two of the data that are measured or trained on which have a file in common."""
    why = {
        ("train", "validation"): "what is measured there was learned",
        ("train", "test"): "what is measured there was learned",
        ("validation", "test"): "what is chosen by the one looks better in the other",
    }
    found: list[str] = []
    for (one, other), told in why.items():
        first, second = getattr(data, one), getattr(data, other)
        if first and second and (file := in_common(first, second, images=images)):
            found.append(f"data.{one} and data.{other} have '{Path(file).name}' in common: {told}")
    return found


def datasets_of(data: Data, config: SourceConfig, tokenizer: str, least: int, progress: Progress) -> Datasets:
    """Return the data of a run for a model of this config; `tokenizer` is where that, or its image processor, lies.

    least: how many examples one step sees. Raises InputError for data that are not there, of another modality, or too
    few for one step, and for options that such data have no use for.
    """
    names = {name: path for name in ("validation", "test") if (path := getattr(data, name))}
    modality = config.architecture.modality
    if idle := [f"data.{name}" for name in _IDLE[modality] if name in data.model_fields_set]:
        raise InputError(f"{joined(idle)}: of no use where a model reads {modality}s; leave it out")
    if modality == "image":
        processor, classes = image_processor_of(tokenizer, config), config.full["num_labels"]
        columns = data.column, data.label_column
        train = Images(data.train, columns, classes, processor, data.max_tokens, progress, least=least)
        held_out: dict[str, Dataset[Any]] = {
            name: Images(path, columns, classes, processor, data.evaluation_tokens, progress, least=1, split=name)
            for name, path in names.items()
        }
        return Datasets(train, held_out, 1, len(train))
    made = tokenizer_of(data.tokenizer or tokenizer)
    vocab, length = config.sizes["vocab"], data.sequence_length
    end: Any = made.eos_token_id
    if config.num_positions is not None and length > config.num_positions:
        raise InputError(f"data.sequence_length is {length}, and the model has positions for {config.num_positions}")
    held_out, bits = {}, {}
    for name, path in names.items():
        tokens = packed(path, data.column, made, vocab, data.evaluation_tokens, progress, split=name)
        held_out[name] = Sequences(tokens, length, least=1, data=path)
        bits[name] = tokens.bits_per_byte
    if data.streaming:
        if data.max_tokens is not None:
            raise InputError("data.max_tokens: nobody counts the tokens of a stream; set training.max_steps instead")
        streamed = StreamedSequences(data.train, data.column, made, vocab, length)
        return Datasets(streamed, held_out, length, None, bits, end_token=end)
    tokens = packed(data.train, data.column, made, vocab, data.max_tokens, progress)
    train = Sequences(tokens, length, least=least, data=data.train)
    return Datasets(train, held_out, length, len(train), bits, tokens.path.parent.name, end)
