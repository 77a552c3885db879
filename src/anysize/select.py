"""From scores to maps: which coordinates of an axis are kept when it shrinks.

`hidden` is one choice for the whole model, because the residual stream is shared; `ffn`, `kv` and `group` are chosen in
every layer. Whole heads are kept or dropped, so rotary pairs are never split. Ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

import torch

from anysize.axis import AxisMap, select
from anysize.calibration.scores import Scores
from anysize.calibration.sites import Site, sites
from anysize.config import SourceConfig
from anysize.errors import SizeError
from anysize.io.reader import TensorSource
from anysize.notation import Dim
from anysize.split import stream
from anysize.tensors import Expected, dim_size, expected_tensors

FROM_DATA = ("activation", "rms", "minitron", "principal")
_STATISTIC = {"activation": "abs", "rms": "rms", "minitron": "minitron", "principal": "rms"}


def reduced(values: torch.Tensor, dim: Dim, sizes: dict[str, int], axis: str, *, root: bool) -> torch.Tensor:
    """Return [size of axis]: what the coordinates of a composed dim add up to along one of its axes.

    `root` adds up squares and takes the root (an L2 norm over the other axes); otherwise values are averaged.
    """
    parts: list[torch.Tensor] = []
    position = 0
    for block in dim.blocks:
        shape = [f.fixed if f.fixed is not None else sizes[f.axis] for f in block.factors]
        part = values[position : position + prod(shape)].reshape(shape)
        position += prod(shape)
        where = [i for i, f in enumerate(block.factors) if f.axis == axis]
        if where:
            others = [i for i in range(len(shape)) if i != where[0]]
            square = part.square() if root else part
            if others:
                square = square.sum(others) if root else square.mean(others)
            parts.append(square)
    total = torch.stack(parts).sum(0)
    return total.sqrt() if root else total


class Selector:
    """Scores and chooses coordinates of one source by one rule. Raises SizeError where the rule lacks its scores."""

    def __init__(
        self,
        config: SourceConfig,
        tensors: TensorSource,
        names: Mapping[str, str],
        how: str,
        seed: int,
        scores: Scores | None,
    ) -> None:
        self.config, self.tensors, self.names = config, tensors, names
        self.how, self.seed, self.scores = how, seed, scores
        self.sizes = config.sizes
        if how in FROM_DATA and scores is None:
            raise SizeError(
                f"select '{how}' chooses by activations: pass --calibration with data or a scores file, or select by "
                "weight, random, first or stride"
            )

    def map(self, axis: str, target_size: int, layer: int | None) -> AxisMap:
        """Return the map that keeps the best `target_size` coordinates, in their old order."""
        size = self.sizes[axis]
        if self.how == "first":
            return select(size, range(target_size))
        if self.how == "stride":
            return select(size, [i * size // target_size for i in range(target_size)])
        if self.how == "random":
            order = stream(self.seed, f"{axis}.{layer}", 0).permutation(size)
            return select(size, sorted(order[:target_size].tolist()))
        return best(self.of(axis, layer), target_size)

    def of(self, axis: str, layer: int | None) -> torch.Tensor:
        """Return float64 [size of axis]: the score of each coordinate, higher is kept."""
        if self.how == "weight":
            return self._weight(axis, layer)
        assert self.scores is not None
        statistic, root = _STATISTIC[self.how], self.how != "activation"
        total = torch.zeros(self.sizes[axis], dtype=torch.float64)
        for site in self._sites(axis, layer):
            total += reduced(self.scores.of(site.name, statistic), site.dim, self.sizes, axis, root=root)
        return total

    def _sites(self, axis: str, layer: int | None) -> Iterable[Site]:
        """Return where an axis is scored: `hidden` at its writers (minitron: where it is read), others where read."""
        assert self.scores is not None
        seen = {self.scores.record.aliases.get(name, name): site for name, site in sites(self.config).items()}
        if axis == "hidden":
            if self.how == "minitron":
                return [s for s in seen.values() if s.side == "in" and "hidden" in s.dim.axes]
            return [s for s in seen.values() if s.side == "out"]
        return [s for s in seen.values() if s.side == "in" and s.layer == layer and axis in s.dim.axes]

    def _weight(self, axis: str, layer: int | None) -> torch.Tensor:
        """Return the L2 norm of all weights that touch each coordinate."""
        total = torch.zeros(self.sizes[axis], dtype=torch.float64)
        for expected in expected_tensors(self.config).values():
            if axis == "hidden" or expected.layer == layer:
                total += self._squares(expected, axis)
        return total.sqrt()

    def _squares(self, expected: Expected, axis: str) -> torch.Tensor | float:
        if axis not in expected.arrow.axes:
            return 0.0
        values = self.tensors.read(self.names[expected.name])
        total: torch.Tensor | float = 0.0
        for position, dim in enumerate(expected.arrow.dims):
            if axis in dim.axes:
                assert dim_size(dim, self.sizes) == values.shape[position]
                flat = values.movedim(position, -1).reshape(-1, values.shape[position])
                along = torch.linalg.vector_norm(flat.float(), dim=0).double()
                total = total + reduced(along, dim, self.sizes, axis, root=True).square()
        return total


def best(scores: torch.Tensor, target_size: int) -> AxisMap:
    """Return the map that keeps the highest scores, in index order; equal scores are kept from the lowest index on."""
    order = torch.argsort(scores, descending=True, stable=True)[:target_size]
    return select(len(scores), sorted(order.tolist()))
