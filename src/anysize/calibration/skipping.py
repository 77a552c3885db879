"""Running a model without some of its layers: nothing is copied, and what is left out costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.sites import layer_paths
from anysize.config import SourceConfig
from anysize.io.models import paths_by_disk_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layers_of(model: PreTrainedModel, config: SourceConfig) -> list[torch.nn.Module]:
    """Return the layers of a model, in order."""
    return [model.get_submodule(path) for path in layer_paths(config, paths_by_disk_name(model))]


@contextmanager
def replaced(layers: Iterable[torch.nn.Module], forward: Callable[..., torch.Tensor]) -> Generator[None]:
    """While active, these layers do this instead."""
    # A forward of the layer's own, as low-memory loading gives it, is put back; the class' needs no putting back.
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer, _ in before:
            layer.forward = forward
        yield
    finally:
        for layer, own in before:
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _hand_on(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What every layer of transformers takes, and what it gives back when it does nothing."""
    return hidden_states


def without(layers: Iterable[torch.nn.Module]) -> Any:
    """While active, these layers hand their input on; masks and positions of all others are as they were."""
    return replaced(layers, _hand_on)
