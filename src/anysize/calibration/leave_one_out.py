"""The loss without each layer: the most direct, and the dearest, score of a layer. Source: 2406.16286 and others."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from anysize.calibration.data import Batch
from anysize.calibration.run import device_of
from anysize.calibration.skipping import layers_of, without
from anysize.config import SourceConfig
from anysize.errors import InputError
from anysize.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NUM_BATCHES = 8


def require_loss(config: SourceConfig, sequence_length: int) -> None:
    """Raise InputError where there is no loss that a layer could be missed by."""
    if config.architecture.modality != "text":
        raise InputError("leave-one-out scores need a loss, and these images have no labels: use block-influence")
    if sequence_length < 2:
        raise InputError(
            f"leave-one-out scores need the loss of a next token, and sequences of {sequence_length} have none: give a "
            "--sequence-length of at least 2"
        )


@torch.no_grad()
def losses_without_layers(
    model: PreTrainedModel, config: SourceConfig, batches: Iterator[Batch], progress: Progress
) -> torch.Tensor:
    """Return float64 [layers]: how much the loss (nats/token) rises when each layer is left out, on 8 batches.

    Raises InputError where a loss is not a number, which would be sorted like one.
    """
    device = device_of(model)
    kept = [{n: v.to(device) for n, v in batch.items()} for batch in itertools.islice(batches, NUM_BATCHES)]

    def loss(missing: AbstractContextManager[None], what: str) -> float:
        with missing:
            losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in kept]
        mean = sum(losses) / len(losses)
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
