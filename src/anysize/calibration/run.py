"""Run a model over calibration batches with hooks at its sites, and add up what they see."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch
from anysize.calibration.experts import routing_weights, watched
from anysize.calibration.sites import Site, layer_paths, sites
from anysize.calibration.statistics import BlockSums, SiteSums
from anysize.config import SourceConfig
from anysize.io.models import paths_by_disk_name
from anysize.tensors import dim_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[int], None]


def _hidden_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _place(values: torch.Tensor) -> tuple[int, int]:
    """Return what tensors with the same content share while they live, views of other shapes included."""
    return values.data_ptr(), values.numel()


def normalized(module: torch.nn.Module, values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a norm makes of its input before its gain: x / rms(x), with the mean taken out first for "layer"."""
    # torch's own default is what modules without gain and bias use (OLMo), which keep no number.
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5)))
    values = values.float()
    if kind == "layer":
        values = values - values.mean(-1, keepdim=True)
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)


class Collector:
    """Hooks on a model that add every forward pass to the sums of its sites and layers."""

    def __init__(self, model: PreTrainedModel, config: SourceConfig, *, second_moments: bool, stride: int = 1) -> None:
        self.model, self.config, self.stride = model, config, stride
        self.sums: dict[str, SiteSums] = {}
        self.blocks = BlockSums(config.sizes["layer"])
        self.aliases: dict[str, str] = {}
        self.feeds: dict[str, str] = {}
        self.second_moments = second_moments
        self._stream: list[torch.Tensor] = []
        self._sequences = 1
        # By side, the last tensor seen and its site; by place, what norms gave and which. Both keep the tensor alive.
        self._last: dict[str, tuple[torch.Tensor, str]] = {}
        self._normed: dict[tuple[int, int], tuple[torch.Tensor, str]] = {}

    def _wants_second(self, site: Site) -> bool:
        if not self.second_moments or site.side in ("out", "branch", "route"):
            return False
        # What a norm of the stream gives follows from the stream's own moments and the gain.
        return site.is_norm or str(site.dim) != "norm(hidden)"

    def _see(self, site: Site, values: torch.Tensor, *, routed: bool = False) -> None:
        """Add what a site saw of a batch: all of its tokens, or with `routed` those that came to one expert."""
        if site.side in ("in", "out", "branch"):
            last = self._last.get(site.side)
            if last is not None and _place(last[0]) == _place(values):
                self.aliases[site.name] = last[1]
                return
            self._last[site.side] = values, site.name
        if site.side == "in" and (seen := self._normed.pop(_place(values), None)) is not None:
            self.feeds[site.name] = seen[1]
        if values.dim() == 2 and not routed:
            # Some modules see the tokens of all sequences as if they were one (routers, the feed-forward of OPT).
            values = values.unflatten(0, (self._sequences, -1))
        self._sums_of(site, values.shape[-1]).add(values, self.stride)

    def _sums_of(self, site: Site, size: int) -> SiteSums:
        if site.name not in self.sums:
            self.sums[site.name] = SiteSums(size, second=self._wants_second(site))
        return self.sums[site.name]

    def _see_norm(
        self, site: Site, module: torch.nn.Module, before: torch.Tensor, after: torch.Tensor, kind: str
    ) -> None:
        self._normed[_place(after)] = after, site.module
        self._see(site, normalized(module, before, kind))

    def _hook(self, site: Site, module: torch.nn.Module, kind: str) -> Any:
        def wrote(_m: torch.nn.Module, _args: Any, out: Any) -> None:
            # A convolution (the patches of an image) has its channels before its places.
            self._see(site, out.flatten(2).transpose(1, 2) if out.dim() == 4 else out)

        def holds(m: torch.nn.Module, _args: Any, out: Any) -> None:
            # [1, rows, size] lies on the first places of every sequence, and is nothing at the others.
            rows = getattr(m, site.part)
            rows = torch.nn.functional.pad(rows, (0, 0, 0, out.shape[1] - rows.shape[1]))
            self._see(site, rows.expand(len(out), -1, -1))

        def routed(_m: torch.nn.Module, _args: Any, out: Any) -> None:
            self._see(site, routing_weights(out))

        def normed(m: torch.nn.Module, args: Any, out: Any) -> None:
            self._see_norm(site, m, args[0], out, kind)

        def reads(_m: torch.nn.Module, args: Any) -> None:
            self._see(site, args[0])

        if site.side == "in":
            return module.register_forward_pre_hook(reads)
        sees = {"norm": normed, "route": routed, "out": wrote, "branch": wrote}[site.side]
        return module.register_forward_hook(holds if site.part else sees)

    def _hook_layer(self, layer: int, module: torch.nn.Module) -> Any:
        def after(_m: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if layer == 0:
                self._stream = [_first(args, kwargs)]
            self._stream.append(_hidden_of(out))

        return module.register_forward_hook(after, with_kwargs=True)

    @cached_property
    def _paths(self) -> dict[str, str]:
        return paths_by_disk_name(self.model)

    @cached_property
    def _sites(self) -> dict[int | None, list[Site]]:
        """The sites that the model has, by layer; None are those around the layers."""
        found: dict[int | None, list[Site]] = {}
        for site in sites(self.config).values():
            if site.module in self._paths:
                found.setdefault(site.layer, []).append(site)
        return found

    @contextmanager
    def attached(self, only: Collection[int | None] | None = None) -> Generator[None]:
        """While active, the model's forward passes are seen.

        only: at these layers' sites alone (None: those around the layers); then nothing is seen of the stream.
        """
        kinds = {norm.kind for norm in self.config.architecture.norms.values() if norm.writes == "norm(hidden)"}
        kind = "layer" if "layer" in kinds else "rms"
        inner: dict[tuple[torch.nn.Module, int], Site] = {}
        handles: list[Any] = []
        for site in itertools.chain(*(found for layer, found in self._sites.items() if only is None or layer in only)):
            module = self.model.get_submodule(self._paths[site.module])
            if site.expert is not None and site.side == "in" and "hidden" not in site.dim.axes:
                inner[module, site.expert] = site
                # Every process has the same sums, whether or not a token comes by.
                self._sums_of(site, dim_size(site.dim, self.config.sizes))
            else:
                handles.append(self._hook(site, module, kind))
        for layer, path in enumerate(layer_paths(self.config, self._paths) if only is None else ()):
            handles.append(self._hook_layer(layer, self.model.get_submodule(path)))

        def came(module: torch.nn.Module, expert: int, values: torch.Tensor) -> None:
            self._see(inner[module, expert], values, routed=True)

        inside = watched(self.model, came) if inner else nullcontext()
        try:
            with inside:
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def batch(self, sequences: int) -> Generator[None]:
        """While active, one batch of so many sequences runs; afterwards nothing of it is held."""
        self._sequences = sequences
        try:
            yield
        finally:
            self._stream, self._last, self._normed = [], {}, {}

    def norm_of(self, hidden: torch.Tensor) -> str:
        """Return the norm that gave a tensor of the batch that runs, "" where none did."""
        return self._normed.get(_place(hidden), (hidden, ""))[1]

    def comes_from(self, hidden: torch.Tensor, norm: str) -> None:
        """Take note of the norm that gave what the batch that runs begins with, if any did."""
        if norm:
            self._normed[_place(hidden)] = hidden, norm

    @torch.no_grad()
    def run(self, batches: Iterable[Batch], report: Report) -> None:
        """Feed batches through the model; `report` hears how many tokens (or images) each held."""
        device = device_of(self.model)
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        for batch in batches:
            moved = {name: values.to(device) for name, values in batch.items()}
            with self.batch(len(next(iter(batch.values())))):
                # The head reads what the last norm gives; its own product is not needed.
                base(**moved) if self.config.architecture.modality == "text" else self.model(**moved)
                if len(self._stream) > 1:
                    self.blocks.add(self._stream)
            report(num_items(batch))


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where a model's inputs belong; weights that are left on disk are on no device."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def num_items(batch: Batch) -> int:
    """Return the tokens of a text batch, or its images."""
    return batch["input_ids"].numel() if "input_ids" in batch else len(batch["pixel_values"])
