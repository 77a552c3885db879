"""From scores to maps: which coordinates of an axis are kept when it shrinks.

`hidden` is one choice for the whole model, because the residual stream is shared; `expert`, `ffn`, `kv` and `group` are
chosen in every layer, `ffn` in every expert by itself. An expert's score is the weight that the router gives it. Whole
heads are kept or dropped, so rotary pairs are never split. Equal scores keep the lower index.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod

import torch

from anysize.axis import AxisMap, select
from anysize.calibration.scores import Scores
from anysize.calibration.sites import Site, sites
from anysize.config import SourceConfig
from anysize.errors import SizeError
from anysize.io.reader import TensorSource
from anysize.notation import Dim
from anysize.removal import kept_blocks
from anysize.shrink import BY_REMOVAL, FROM_DATA
from anysize.split import stream
from anysize.tensors import Expected, dim_size, expected_tensors

# Of what goes by removal (`BY_REMOVAL`), these are for the rest: `hidden` and experts.
_STATISTIC = {"activation": "abs", "rms": "rms", "minitron": "minitron", "refit": "abs", "principal": "rms"}
_INNER = ("ffn", "kv", "group")


def reduced(values: torch.Tensor, dim: Dim, sizes: Mapping[str, int], axis: str, *, root: bool) -> torch.Tensor:
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

    @property
    def tells_places_apart(self) -> bool:
        """Whether the rule may keep other coordinates in one layer or expert than in another."""
        return self.how not in ("first", "stride")

    def map(self, axis: str, target_size: int, layer: int | None, expert: int | None = None) -> AxisMap:
        """Return the map that keeps the best `target_size` coordinates, in their old order."""
        size = self.sizes[axis]
        if self.how == "first":
            return select(size, range(target_size))
        if self.how == "stride":
            return select(size, [i * size // target_size for i in range(target_size)])
        if self.how == "random":
            place = f"{layer}" if expert is None else f"{layer}.{expert}"
            order = stream(self.seed, f"{axis}.{place}", 0).permutation(size)
            return select(size, sorted(order[:target_size].tolist()))
        if self.how in BY_REMOVAL and axis in _INNER:
            return self._cheapest(axis, target_size, layer, expert)
        return best(self.of(axis, layer, expert), target_size)

    def _cheapest(self, axis: str, target_size: int, layer: int | None, expert: int | None) -> AxisMap:
        """Return the map without those coordinates that cost least once what reads them is fitted again."""
        assert self.scores is not None
        # Where every expert has a map of its own, the layer's only stands for their size: the first expert's will do.
        site = next(iter(self._sites(axis, layer, expert)))
        moments = self.scores.of(site.name, "second")
        (block,) = site.dim.blocks
        if not moments.any():
            # An expert that no token was routed to: nothing is known, so the first stay.
            return select(self.sizes[axis], range(target_size))
        shape = [self.sizes[f.axis] for f in block.factors]
        place = [f.axis for f in block.factors].index(axis)
        channels = torch.arange(prod(shape)).reshape(shape).movedim(place, 0).reshape(self.sizes[axis], -1)
        expected = next(e for e in self._expected[layer] if e.name == f"{site.module}.weight")
        weight = self.tensors.read(self.names[expected.name]).double()
        weight = weight.T if expected.arrow.reads_first else weight
        kept = kept_blocks(weight, moments, channels, target_size)
        return select(self.sizes[axis], kept)

    def of(self, axis: str, layer: int | None, expert: int | None = None) -> torch.Tensor:
        """Return float64 [size of axis]: the score of each coordinate (of one expert), higher is kept."""
        if self.how == "weight":
            return self._weight(axis, layer, expert)
        assert self.scores is not None
        statistic, root = _STATISTIC[self.how], self.how not in ("activation", "refit")
        total = torch.zeros(self.sizes[axis], dtype=torch.float64)
        for site in self._sites(axis, layer, expert):
            total += reduced(self.scores.of(site.name, statistic), site.dim, self.sizes, axis, root=root)
        return total

    @cached_property
    def _seen(self) -> dict[int | None, list[Site]]:
        """The sites of each layer, None for those outside; of sites that saw the same, one."""
        assert self.scores is not None
        seen = {self.scores.record.aliases.get(name, name): site for name, site in sites(self.config).items()}
        found: dict[int | None, list[Site]] = {}
        for site in seen.values():
            found.setdefault(site.layer, []).append(site)
        return found

    def _sites(self, axis: str, layer: int | None, expert: int | None) -> Iterable[Site]:
        """Return where an axis is scored: `hidden` at what writes the stream (minitron: where it is read), `expert` at
        the router, others where they are read."""
        if axis == "hidden":
            every = [site for here in self._seen.values() for site in here]
            if self.how == "minitron":
                return [s for s in every if s.side == "in" and "hidden" in s.dim.axes]
            return [s for s in every if s.side == "out"]
        side = "route" if axis == "expert" else "in"
        return [
            s
            for s in self._seen.get(layer, [])
            if s.side == side and axis in s.dim.axes and (expert is None or s.expert == expert)
        ]

    @cached_property
    def _expected(self) -> dict[int | None, list[Expected]]:
        found: dict[int | None, list[Expected]] = {}
        for expected in expected_tensors(self.config).values():
            found.setdefault(expected.layer, []).append(expected)
        return found

    def _weight(self, axis: str, layer: int | None, expert: int | None) -> torch.Tensor:
        """Return the L2 norm of all weights that touch each coordinate."""
        total = torch.zeros(self.sizes[axis], dtype=torch.float64)
        for place, found in self._expected.items():
            for expected in found if axis == "hidden" or place == layer else ():
                if expert is None or expected.expert == expert:
                    total += self._squares(expected, axis)
        return total.sqrt()

    def _squares(self, expected: Expected, axis: str) -> torch.Tensor | float:
        whole = axis == "expert" and expected.expert is not None
        if axis not in expected.arrow.axes and not whole:
            return 0.0
        values = self.tensors.read(self.names[expected.name])
        if whole:
            mine = torch.arange(self.sizes[axis]) == expected.expert
            return mine * torch.linalg.vector_norm(values.float()).double().square()
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
