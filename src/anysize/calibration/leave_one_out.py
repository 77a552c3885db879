"""The loss without each layer: the most direct, and the dearest, score of a layer. Source: 2406.16286 and others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from anysize.calibration.data import Batch
from anysize.calibration.run import device_of
from anysize.calibration.skipping import layers_of, without
from anysize.config import SourceConfig
from anysize.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCHES = 8


@torch.no_grad()
def losses_without_layers(
    model: PreTrainedModel, config: SourceConfig, batches: Iterator[Batch], progress: Callable[[str, int, int], None]
) -> torch.Tensor:
    """Return float64 [layers]: how much the loss (nats/token) rises when each layer is left out, on 8 batches."""
    if config.architecture.modality != "text":
        raise InputError("leave-one-out scores need a loss, and these images have no labels: use block-influence")
    device = device_of(model)
    kept = [{n: v.to(device) for n, v in batch.items()} for batch in itertools.islice(batches, _BATCHES)]

    def loss(without: AbstractContextManager[None]) -> float:
        with without:
            losses = [float(model(**batch, labels=batch["input_ids"]).loss) for batch in kept]
        return sum(losses) / len(losses)

    layers = layers_of(model, config)
    whole = loss(nullcontext())
    found: list[float] = []
    for number, layer in enumerate(layers):
        found.append(loss(without([layer])) - whole)
        progress("leave one out", number + 1, len(layers))
    return torch.tensor(found, dtype=torch.float64)
