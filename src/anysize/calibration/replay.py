"""The layers of one model, called one at a time with a stream of our own: their weights are there only meanwhile.

A model is built without weights. What stands before and after its layers is read to learn how it calls them and what
the first of them reads; after that a layer is read, called on every batch, and dropped. However many layers there are,
one of them is in memory, and each is read once.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch
from anysize.calibration.skipping import layers_of, replaced, without
from anysize.config import SourceConfig
from anysize.devices import CPU
from anysize.io.models import empty_model, fused_by_disk_name, paths_by_disk_name
from anysize.tensors import Expected, expected_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A tensor by its name in the table.
Read = Callable[[str], torch.Tensor]


@dataclass
class _Call:
    """How a model called its layers on one batch: everything but the hidden states, which a replay brings."""

    args: list[tuple[Any, ...]]
    kwargs: list[dict[str, Any]]

    def equals(self, other: _Call) -> bool:
        """Whether a layer would be called in the same way."""
        return _equal(self.args, other.args) and _equal(self.kwargs, other.kwargs)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        return one is other or (both and one.dtype == other.dtype and torch.equal(one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one is other or one == other)


class Layers:
    """The layers of one model on a device, in single precision. `read` gives a tensor by its name in the table."""

    def __init__(self, config: SourceConfig, read: Read, device: torch.device = CPU) -> None:
        self.config, self.device, self._read = config, device, read
        self.model: PreTrainedModel = empty_model(config.model_class, config.raw)
        for module in self.model.modules():
            # What it computes for itself; its parameters are on no device yet.
            module._buffers.update({n: v if v is None else v.to(device) for n, v in module._buffers.items()})
        self.expected = expected_tensors(config)
        self.paths = paths_by_disk_name(self.model)
        self._fused = fused_by_disk_name(self.model) if "expert" in config.sizes else {}
        self.layers = layers_of(self.model, config)
        self.calls: list[_Call] = []
        self.stream: list[torch.Tensor] = []

    def module(self, name: str) -> torch.nn.Module:
        """Return a module by its name on disk."""
        return self.model.get_submodule(self.paths[name])

    @contextmanager
    def holding(self, tensors: Iterable[Expected]) -> Generator[None]:
        """While active, these tensors are in memory, in copies of their own."""
        before: dict[tuple[torch.nn.Module, str], Any] = {}
        try:
            for name in [e.name for e in tensors]:
                path, _, part = name.rpartition(".")
                module, fused = self.module(path), self._fused.get(name)
                part = part if fused is None else fused.parameter
                parameters: dict[str, Any] = module._parameters
                empty = before.setdefault((module, part), parameters[part])
                if fused is None:
                    # A copy: what is fitted is written into it, and a model in memory hands its own tensors out.
                    values = self._read(name).to(self.device, torch.float32, copy=True)
                    parameters[part] = torch.nn.Parameter(values, requires_grad=False)
                    continue
                if parameters[part] is empty:
                    whole = torch.empty_like(empty, dtype=torch.float32, device=self.device)
                    parameters[part] = torch.nn.Parameter(whole, requires_grad=False)
                fused.within(parameters[part]).copy_(self._read(name))
            yield
        finally:
            for (module, part), empty in before.items():
                module._parameters[part] = empty

    def layer(self, layer: int) -> Any:
        """While active, the weights of one layer are in memory."""
        return self.holding(e for e in self.expected.values() if e.layer == layer)

    def around(self) -> Any:
        """While active, what stands before and after the layers is in memory; heads are not."""
        inside = set(self._base.modules())
        return self.holding(
            e for e in self.expected.values() if e.layer is None and self.module(e.name.rpartition(".")[0]) in inside
        )

    @property
    def _base(self) -> torch.nn.Module:
        return getattr(self.model, self.model.base_model_prefix, self.model)

    def _run_base(self, batch: Batch) -> None:
        moved = {name: values.to(self.device) for name, values in batch.items()}
        self._base(**moved, **({"use_cache": False} if "input_ids" in batch else {}))

    @torch.no_grad()
    def start(self, batches: Iterable[Batch], keep: Callable[[torch.Tensor], None] | None = None) -> None:
        """Learn from every batch how layers are called, and what the first of them reads.

        keep: takes that of each batch, in their order; `stream` does where nothing is named.
        """
        # Layers hand on what they read: nothing but the stream differs from one to the next.
        with self.around(), without(self.layers):
            for batch in batches:
                self._start(batch, keep or self.stream.append)

    @torch.no_grad()
    def end(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Run what stands around the layers, which is in memory, with the stream [...] that the last of them left."""
        with without(self.layers[:-1]), replaced(self.layers[-1:], lambda *_, **__: hidden):
            self._run_base(batch)

    def _start(self, batch: Batch, keep: Callable[[torch.Tensor], None]) -> None:
        call = _Call([], [])
        first: list[torch.Tensor] = []

        def remember(_m: torch.nn.Module, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            first.append(hidden) if not first else None
            call.args.append(args[1:])
            call.kwargs.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

        hooks = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in self.layers]
        try:
            self._run_base(batch)
        finally:
            for hook in hooks:
                hook.remove()
        # Masks and positions are mostly those of the batch before: then they are there once.
        same = self.calls and self.calls[-1].equals(call)
        self.calls.append(self.calls[-1] if same else call)
        keep(first[0])

    def replay(self, layer: int, batch: int) -> torch.Tensor:
        """Return the stream after one layer, whose weights are in memory."""
        return self.after(layer, batch, self.stream[batch])

    @torch.no_grad()
    def after(self, layer: int, batch: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what one layer, whose weights are in memory, makes of a stream in the place of a batch's own."""
        call = self.calls[batch]
        out = self.layers[layer](hidden, *call.args[layer], **call.kwargs[layer])
        return out[0] if isinstance(out, tuple) else out

    def skip(self, layers: Iterable[int]) -> None:
        """Take the stream past these layers."""
        for layer in layers:
            with self.layer(layer):
                self.stream = [self.replay(layer, batch) for batch in range(len(self.calls))]

    @contextmanager
    def tapped(self, names: list[str], side: str) -> Generator[dict[str, torch.Tensor]]:
        """While active, what these modules read ("in") or write ("out") is kept, by name."""
        seen: dict[str, torch.Tensor] = {}

        def tap(name: str) -> Any:
            def inputs(_m: torch.nn.Module, args: Any) -> None:
                seen[name] = args[0]

            def outputs(_m: torch.nn.Module, _args: Any, out: Any) -> None:
                seen[name] = out

            module = self.module(name)
            return module.register_forward_pre_hook(inputs) if side == "in" else module.register_forward_hook(outputs)

        hooks = [tap(name) for name in names]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
