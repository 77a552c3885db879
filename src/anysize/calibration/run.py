"""Run a model over calibration batches with hooks at its sites, and add up what they see."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.data import Batch
from anysize.calibration.sites import Site, layer_paths, sites
from anysize.calibration.statistics import BlockSums, SiteSums
from anysize.config import SourceConfig
from anysize.io.models import paths_by_disk_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Report = Callable[[int], None]


def _hidden_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def normalized(module: torch.nn.Module, values: torch.Tensor, kind: str) -> torch.Tensor:
    """Return what a norm makes of its input before its gain: x / rms(x), with the mean taken out first for "layer"."""
    eps = float(getattr(module, "variance_epsilon", getattr(module, "eps", 1e-6)))
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
        self._last: tuple[torch.Tensor, str] | None = None
        self._normed: dict[int, tuple[torch.Tensor, str]] = {}

    def _wants_second(self, site: Site) -> bool:
        if not self.second_moments or site.side == "out":
            return False
        # What a norm of the stream gives follows from the stream's own moments and the gain.
        return site.is_norm or str(site.dim) != "norm(hidden)"

    def _see(self, site: Site, values: torch.Tensor) -> None:
        if site.side == "in":
            if self._last is not None and self._last[0] is values:
                self.aliases[site.name] = self._last[1]
                return
            self._last = values, site.name
            seen = self._normed.pop(id(values), None)
            if seen is not None:
                self.feeds[site.name] = seen[1]
        sums = self.sums.get(site.name)
        if sums is None:
            sums = self.sums[site.name] = SiteSums(values.shape[-1], second=self._wants_second(site))
        sums.add(values, self.stride)

    def _see_norm(
        self, site: Site, module: torch.nn.Module, before: torch.Tensor, after: torch.Tensor, kind: str
    ) -> None:
        self._normed[id(after)] = after, site.module
        self._see(site, normalized(module, before, kind))

    def _hook(self, site: Site, module: torch.nn.Module, kind: str) -> Any:
        def wrote(_m: torch.nn.Module, _args: Any, out: Any) -> None:
            # A convolution (the patches of an image) has its channels before its places.
            self._see(site, out.flatten(2).transpose(1, 2) if out.dim() == 4 else out)

        def normed(m: torch.nn.Module, args: Any, out: Any) -> None:
            self._see_norm(site, m, args[0], out, kind)

        def reads(_m: torch.nn.Module, args: Any) -> None:
            self._see(site, args[0])

        if site.side == "in":
            return module.register_forward_pre_hook(reads)
        return module.register_forward_hook(normed if site.is_norm else wrote)

    def _hook_layer(self, layer: int, module: torch.nn.Module) -> Any:
        def after(_m: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            if layer == 0:
                self._stream = [_first(args, kwargs)]
            self._stream.append(_hidden_of(out))

        return module.register_forward_hook(after, with_kwargs=True)

    @contextmanager
    def attached(self) -> Generator[None]:
        """While active, the model's forward passes are seen."""
        paths = paths_by_disk_name(self.model)
        modules = {name: self.model.get_submodule(path) for name, path in paths.items()}
        kinds = {norm.kind for norm in self.config.architecture.norms.values() if norm.writes == "norm(hidden)"}
        kind = "layer" if "layer" in kinds else "rms"
        handles = [
            self._hook(site, modules[site.module], kind) for site in sites(self.config).values() if site.module in paths
        ]
        for layer, path in enumerate(layer_paths(self.config, paths)):
            handles.append(self._hook_layer(layer, self.model.get_submodule(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def run(self, batches: Iterable[Batch], report: Report) -> None:
        """Feed batches through the model; `report` hears how many tokens (or images) each held."""
        device = device_of(self.model)
        base = getattr(self.model, self.model.base_model_prefix, self.model)
        for batch in batches:
            moved = {name: values.to(device) for name, values in batch.items()}
            # The head reads what the last norm gives; its own product is not needed.
            base(**moved) if self.config.architecture.modality == "text" else self.model(**moved)
            if len(self._stream) > 1:
                self.blocks.add(self._stream)
            self._stream, self._last, self._normed = [], None, {}
            report(num_items(batch))


def device_of(model: torch.nn.Module) -> torch.device:
    """Return where a model's inputs belong; weights that are left on disk are on no device."""
    device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def num_items(batch: Batch) -> int:
    """Return the tokens of a text batch, or its images."""
    return batch["input_ids"].numel() if "input_ids" in batch else len(batch["pixel_values"])
