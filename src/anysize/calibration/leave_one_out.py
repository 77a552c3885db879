"""The loss without each layer: the most direct, and the dearest, score of a layer. Source: 2406.16286 and others."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch, DataOptions, batches, batches_of_labels, labelled_batches
from anysize.calibration.run import device_of
from anysize.calibration.skipping import layers_of, without
from anysize.config import SourceConfig
from anysize.errors import InputError
from anysize.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So many sequences, or images, are run without each layer, whatever the batches.
NUM_SEQUENCES = 64


def require_loss(config: SourceConfig, data: str, source: str, options: DataOptions) -> None:
    """Raise InputError where there is no loss that a layer could be missed by: of images, where labels are missing."""
    if config.architecture.modality == "image":
        if config.sizes["label"] < 2:
            raise InputError(
                f"leave-one-out scores need the loss of a class, and '{source}' tells {config.sizes['label']} apart: "
                "use block-influence"
            )
        # Pixels would be made twice, and take most of the time.
        for _ in batches_of_labels(data, config, source, _few(config, options)):
            pass
    elif options.sequence_length < 2:
        raise InputError(
            f"leave-one-out scores need the loss of a next token, and sequences of {options.sequence_length} have "
            "none: give a --sequence-length of at least 2"
        )


def batches_with_loss(data: str, config: SourceConfig, source: str, options: DataOptions) -> Iterator[Batch]:
    """Yield the first 64 sequences that `batches` yields, or images with their labels."""
    read = labelled_batches if config.architecture.modality == "image" else batches
    return read(data, config, source, _few(config, options))


def _few(config: SourceConfig, options: DataOptions) -> DataOptions:
    most = NUM_SEQUENCES * (1 if config.architecture.modality == "image" else options.sequence_length)
    return replace(options, tokens=min(options.tokens, most))


def _loss(model: PreTrainedModel, batch: Batch) -> float:
    callable_model: Any = model
    if "input_ids" in batch:
        return float(callable_model(**batch, labels=batch["input_ids"]).loss)
    # Of the logits, because a config may have transformers take another loss than that of a class.
    logits = callable_model(pixel_values=batch["pixel_values"]).logits
    return float(torch.nn.functional.cross_entropy(logits.float(), batch["labels"]))


@torch.no_grad()
def losses_without_layers(
    model: PreTrainedModel, config: SourceConfig, read: Iterator[Batch], progress: Progress
) -> torch.Tensor:
    """Return float64 [layers]: how much the loss rises when each layer is left out, on batches with a loss.

    The loss is that of the next token (nats/token), or of an image's label (nats/image).

    Raises InputError where a loss is not a number, which would be sorted like one.
    """
    device = device_of(model)
    kept = [{n: v.to(device) for n, v in batch.items()} for batch in read]
    sizes = [len(next(iter(batch.values()))) for batch in kept]

    def loss(missing: AbstractContextManager[None], what: str) -> float:
        with missing:
            losses = [_loss(model, batch) for batch in kept]
        # The last batch may be shorter: every sequence, or image, counts alike.
        mean = sum(size * loss for size, loss in zip(sizes, losses, strict=True)) / sum(sizes)
        if not math.isfinite(mean):
            raise InputError(f"the loss {what} is {mean} on these data, so it scores no layer: use block-influence")
        return mean

    layers = layers_of(model, config)
    whole = loss(nullcontext(), "of the source")
    found: list[float] = []
    for number, layer in enumerate(layers):
        found.append(loss(without([layer]), f"without layer {number}") - whole)
        progress("leave one out", number + 1, len(layers))
    return torch.tensor(found, dtype=torch.float64)
