"""How far a model without some of its layers is from the whole: KL(source || candidate) on given batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch
from anysize.calibration.run import device_of
from anysize.calibration.skipping import layers_of, replaced, without
from anysize.config import SourceConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kl(source: torch.Tensor, candidate: torch.Tensor) -> float:
    """Return the mean KL(source || candidate) of logits [batch, ..., classes], in nats per row (a token, an image)."""
    total = 0.0
    # One sequence at a time: log-probabilities over a vocabulary are the largest thing in memory.
    for one, other in zip(source, candidate, strict=True):
        p, q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total / (source.numel() // source.shape[-1])


class Divergence:
    """Measures sets of layers of one source against all of them.

    The layers of the source run once a batch. What is kept of that is the stream after the last of them, `hidden`
    numbers a token: the head makes the exact logits of it again, once for all sets that are measured together.
    Keeping log-probabilities would take a vocabulary of numbers a token (17 GB for 32,768 tokens of 128,000), and the
    largest few of them would miss what a candidate puts on all others.
    """

    def __init__(self, load: Callable[[], PreTrainedModel], config: SourceConfig, batches: Sequence[Batch]) -> None:
        self.config, self.batches = config, batches
        self._load = load
        self._fixed = {"use_cache": False} if config.architecture.modality == "text" else {}
        self._streams: dict[int, torch.Tensor] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        """The source, loaded when something is measured for the first time."""
        return self._load()

    @cached_property
    def layers(self) -> list[torch.nn.Module]:
        """The layers of the source, in order."""
        return layers_of(self.model, self.config)

    @torch.no_grad()
    def of(self, kept: Sequence[Collection[int]], batch: int) -> Iterator[float]:
        """Yield, for every set of kept layers, its KL to the source on one batch in nats per token (or image)."""
        source = self._source(batch)
        for layers in kept:
            with without([module for layer, module in enumerate(self.layers) if layer not in layers]):
                logits = self._logits(batch)
            yield kl(source, logits)

    def _inputs(self, batch: int) -> dict[str, Any]:
        device = device_of(self.model)
        return {**{name: values.to(device) for name, values in self.batches[batch].items()}, **self._fixed}

    def _logits(self, batch: int) -> torch.Tensor:
        return self.model(**self._inputs(batch)).logits

    def _source(self, batch: int) -> torch.Tensor:
        """Return the source's logits: its head on the stream that its last layer gave."""
        if batch not in self._streams:
            self._streams[batch] = self._stream(batch)
        stream = self._streams[batch]
        with without(self.layers[:-1]), replaced(self.layers[-1:], lambda *_, **__: stream):
            return self._logits(batch)

    def _stream(self, batch: int) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def see(_m: torch.nn.Module, _args: Any, out: torch.Tensor) -> None:
            seen.append(out)

        hook = self.layers[-1].register_forward_hook(see)
        try:
            # The head's own product is not needed here.
            getattr(self.model, self.model.base_model_prefix, self.model)(**self._inputs(batch))
        finally:
            hook.remove()
        return seen[0]
