"""The loss without each layer: the most direct, and the dearest, score of a layer. Source: 2406.16286 and others."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch
from anysize.calibration.run import device_of
from anysize.calibration.sites import layer_paths
from anysize.config import SourceConfig
from anysize.errors import InputError
from anysize.io.models import paths_by_disk_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BATCHES = 8


class _Skipped(AbstractContextManager[None]):
    """While active, a layer hands its input on."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self.layer = layer

    def __enter__(self) -> None:
        def hand_on(_m: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            return (before, *out[1:]) if isinstance(out, tuple) else before

        self.handle = self.layer.register_forward_hook(hand_on, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


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

    paths = layer_paths(config, paths_by_disk_name(model))
    whole = loss(nullcontext())
    found: list[float] = []
    for layer, path in enumerate(paths):
        found.append(loss(_Skipped(model.get_submodule(path))) - whole)
        progress("leave one out", layer + 1, len(paths))
    return torch.tensor(found, dtype=torch.float64)
