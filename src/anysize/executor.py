"""The executor: recipe and source tensor in, target tensor out, in blocks of rows. The only code that makes weights.

A target tensor is computed as a matrix: copied cells are W'[j, l] = factor * W[i(j), i(l)] * share(j, l), and new rows
and columns hold zeros, means or fresh values, as the maps of the two dims say. Blocks are independent of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import isfinite, prod

import numpy as np
import torch

from anysize.axis import NEW, AxesAt, AxisMap, Index, own_place
from anysize.dense import DenseMaps
from anysize.dims import DimMap, Fill, compose
from anysize.errors import CheckpointError
from anysize.io.dtypes import TORCH
from anysize.io.reader import TensorSource
from anysize.notation import Dim, parse
from anysize.recipe import Plan, Recipe
from anysize.split import normal, paired_noise, random_shares, rms, rows_per_block, stream

# Means of a large tensor are taken over so many rows at a time, so that no wide copy of all of it is made.
ROWS_OF_A_SUM = 1 << 13
_PADS = {"zero": Fill.ZERO, "mean": Fill.MEAN, "one": Fill.ONE}


def _selector(index: Index) -> slice | torch.Tensor:
    """Return a slice where the index is one ascending run, so that torch copies instead of gathering."""
    if index.size and bool((np.diff(index) == 1).all()):
        return slice(int(index[0]), int(index[-1]) + 1)
    return torch.from_numpy(np.ascontiguousarray(index))


class DimMaps:
    """The composed dim maps of one plan, each made once, and its dense maps."""

    def __init__(self, axes: Mapping[str, AxisMap], dense: DenseMaps | None = None) -> None:
        self._axes = axes
        self.dense = DenseMaps() if dense is None else dense
        self._cached = lru_cache(maxsize=None)(self._compose)

    def _compose(
        self, dim: Dim, writes: bool, pad: Fill, score_power: float, layer: int | None, expert: int | None
    ) -> DimMap:
        return compose(dim, AxesAt(self._axes, layer, expert), writes=writes, pad=pad, score_power=score_power)

    def of(self, recipe: Recipe) -> tuple[DimMap, ...]:
        """Return one map for every stored dim of a recipe's tensor, as it stands after the dense maps."""
        arrow = parse(recipe.arrow)
        if recipe.value:
            return tuple(_identity(size) for size in recipe.shape)

        def composed(dim: Dim, writes: bool, dense: str) -> DimMap:
            if dense:
                return _identity(self.dense.place(dense).shape[0 if writes else 1])
            place = own_place(self._axes, dim.axes, recipe.layer, recipe.expert)
            return self._cached(dim, writes, _PADS[recipe.pad], recipe.score_power, *place)

        writes = [composed(dim, True, recipe.writer) for dim in arrow.writes]
        reads = [composed(dim, False, recipe.reader) for dim in arrow.reads]
        return (*reads, *writes) if arrow.reads_first else (*writes, *reads)

    def through_dense(self, recipe: Recipe, source: torch.Tensor) -> torch.Tensor:
        """Return the source tensor after the dense maps of a recipe, in double precision where there are any."""
        if recipe.value:
            return torch.from_numpy(self.dense[recipe.value])
        if not recipe.reader and not recipe.writer:
            return source
        first, last = 0, source.dim() - 1
        reads, writes = (first, last) if parse(recipe.arrow).reads_first else (last, first)
        values = source.double()
        if recipe.reader:
            values = _along(values, reads, torch.from_numpy(self.dense[recipe.reader]).T)
        if recipe.writer:
            values = _along(values, writes, torch.from_numpy(self.dense[recipe.writer]))
        return values


def _along(values: torch.Tensor, dim: int, matrix: torch.Tensor) -> torch.Tensor:
    """Return the matrix [m, n] applied along one dim of n."""
    return (values.movedim(dim, -1) @ matrix.to(values.dtype).T).movedim(-1, dim)


def _identity(size: int) -> DimMap:
    return DimMap(size, np.arange(size), np.zeros(size, np.uint8), np.ones(size))


def as_matrix(maps: tuple[DimMap, ...], shape: tuple[int, ...]) -> tuple[DimMap, DimMap]:
    """Return the row and column maps of a tensor seen as a matrix: dims that do not change are merged."""
    if len(maps) == 1:
        return maps[0], _identity(1)
    if len(maps) == 2:
        return maps[0], maps[1]
    if all(m.is_identity for m in maps[:-1]):
        return _identity(prod(shape[:-1])), maps[-1]
    if all(m.is_identity for m in maps[1:]):
        return maps[0], _identity(prod(shape[1:]))
    raise AssertionError("a tensor with more than two dims may be resized along its first or last dim only")


class TensorJob:
    """One target tensor in the making: `block(i)` returns rows [i * rows, …) of it as a 2-D tensor.

    `source` is the whole source tensor. Raises CheckpointError where it holds NaN or Inf, unless allowed.
    """

    def __init__(
        self, recipe: Recipe, source: torch.Tensor, maps: DimMaps, seed: int, *, allow_nonfinite: bool = False
    ) -> None:
        self.recipe, self.seed, self.dtype = recipe, seed, TORCH[recipe.dtype]
        # Scaling a weight can carry it beyond what half precision holds, though the source itself fits.
        self.may_overflow = recipe.dtype == "F16" and not allow_nonfinite
        if not allow_nonfinite:
            _require_storable(recipe, source, self.dtype)
        source = maps.through_dense(recipe, source)
        rows, columns = as_matrix(maps.of(recipe), tuple(source.shape))
        matrix = source.reshape(rows.source_size, columns.source_size)
        # Shares divide what is read and channel factors scale what is written; where the file stores the read dim
        # first, the work is done on the transpose.
        scaled_columns = bool((columns.factor != 1).any())
        self.transposed = parse(recipe.arrow).reads_first and (recipe.share != "none" or scaled_columns)
        if self.transposed:
            rows, columns, matrix = columns, rows, matrix.T.contiguous()
        self.rows, self.columns, self.matrix = rows, columns, matrix
        self.groups = [(_selector(g.sources), [_selector(t) for t in g.targets]) for g in columns.groups]
        self.ordinal = torch.from_numpy(rows.ordinal) if recipe.share == "diagonal" else None
        self.noise = 0.0 if recipe.noise_db is None else rms(source) * 10 ** (-recipe.noise_db / 20)
        # Noise follows the channels' own scale, so that widened heads keep the ratio that was asked for.
        self.noise *= rms(torch.from_numpy(rows.factor[rows.fill == Fill.COPY]))
        self.fresh_std = self._fresh_std(source)
        self.rows_per_block = rows_per_block(columns.target_size)
        self.means = self._mean_row()

    @property
    def num_blocks(self) -> int:
        return 1 if self.transposed else self._num_row_blocks

    @property
    def _num_row_blocks(self) -> int:
        return -(-self.rows.target_size // self.rows_per_block)

    @property
    def block_rows(self) -> int:
        """Rows of the stored matrix that one block holds (the last one may hold fewer)."""
        return self.columns.target_size if self.transposed else self.rows_per_block

    @property
    def stored_rows(self) -> int:
        """Rows of the stored matrix."""
        return self.columns.target_size if self.transposed else self.rows.target_size

    def _fresh_std(self, source: torch.Tensor) -> float:
        """Return the standard deviation of new values: as large as the copied ones, if the recipe says so."""
        new = bool((self.rows.fill == Fill.FRESH).any() or (self.columns.fill == Fill.FRESH).any())
        if not (new and self.recipe.fresh_scale):
            return self.recipe.fresh_std
        return rms(source) * abs(self.recipe.factor) * self.recipe.fresh_scale or self.recipe.fresh_std

    def _mean_row(self) -> torch.Tensor | None:
        if not (self.rows.fill == Fill.MEAN).any():
            return None
        total = torch.zeros(1, self.matrix.shape[1], dtype=torch.float64)
        for rows in self.matrix.split(ROWS_OF_A_SUM):
            total += rows.to(torch.float64).sum(dim=0, keepdim=True)
        return (total / len(self.matrix)).to(self.matrix.dtype)

    def block(self, number: int) -> torch.Tensor:
        """Return block `number` in storage orientation, contiguous, in the target's dtype."""
        if self.transposed:
            made = torch.cat([self._row_block(i) for i in range(self._num_row_blocks)]).T.contiguous()
        else:
            made = self._row_block(number)
        if self.may_overflow and not is_finite(made):
            raise CheckpointError(
                f"tensor '{self.recipe.name}' has values that float16 cannot store once it is made: choose a wider "
                "--dtype, such as bfloat16"
            )
        return made

    def _scaled(self, values: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        if isinstance(factor, float) and factor == 1.0:
            return values.to(self.dtype)
        wide = torch.float64 if torch.float64 in (values.dtype, self.dtype) else torch.float32
        offset = 1.0 if self.recipe.stored_as == "1+w" else 0.0
        return ((values.to(wide) + offset) * torch.as_tensor(factor, dtype=wide) - offset).to(self.dtype)

    def _gathered(self, lo: int, hi: int) -> torch.Tensor:
        """Return the source rows of a block, scaled; rows of new capacity hold the mean or are filled later."""
        index, fill = self.rows.index[lo:hi], self.rows.fill[lo:hi]
        if (fill == Fill.COPY).all():
            values = self.matrix[_selector(index)]
        else:
            values = self.matrix[torch.from_numpy(np.where(index == NEW, 0, index))]
            if self.means is not None:
                values[torch.from_numpy(fill == Fill.MEAN)] = self.means
        channel = self.rows.factor[lo:hi]
        if (channel == 1).all():
            return self._scaled(values, self.recipe.factor)
        return self._scaled(values, torch.from_numpy(channel[:, None] * self.recipe.factor))

    def _copies(
        self, values: torch.Tensor, num: int, lo: int, hi: int, generator: np.random.Generator
    ) -> list[torch.Tensor]:
        """Return what each of `num` copies of a group of columns holds: together they read the source's values."""
        share = self.recipe.share
        if num == 1 or share == "none":
            return [values] * num
        if share == "random":
            return random_shares(values, num, generator)
        if share == "equal":
            copies = [self._divided(values, num)] * num
        else:
            assert self.ordinal is not None
            mine = (self.ordinal[lo:hi] % num)[:, None]
            copies = [torch.where(mine == t, values, torch.zeros((), dtype=values.dtype)) for t in range(num)]
        return paired_noise(copies, self.noise * self.recipe.factor / num, generator) if self.noise else copies

    @staticmethod
    def _divided(values: torch.Tensor, num: int) -> torch.Tensor:
        return values * (1 / num) if num & (num - 1) == 0 else values / num

    def _row_block(self, number: int) -> torch.Tensor:
        lo = number * self.rows_per_block
        hi = min(lo + self.rows_per_block, self.rows.target_size)
        out = torch.empty((hi - lo, self.columns.target_size), dtype=self.dtype)
        if self.recipe.silent:
            return out.fill_(self._one - 1.0)
        generator = stream(self.seed, self.recipe.name, number)
        values = self._gathered(lo, hi)
        for sources, targets in self.groups:
            part = values if self._whole(sources) else values[:, sources]
            for target, copy in zip(targets, self._copies(part, len(targets), lo, hi, generator), strict=True):
                out[:, target] = copy
        self._fill_columns(out, values, generator)
        self._fill_rows(out, lo, hi, generator)
        return out

    def _whole(self, sources: slice | torch.Tensor) -> bool:
        return sources == slice(0, self.columns.source_size) if isinstance(sources, slice) else False

    def _fill_columns(self, out: torch.Tensor, values: torch.Tensor, generator: np.random.Generator) -> None:
        fill = self.columns.fill
        if (fill == Fill.COPY).all():
            return
        for kind in (Fill.ZERO, Fill.FRESH, Fill.MEAN, Fill.ONE):
            where = np.flatnonzero(fill == kind)
            if where.size:
                out[:, _selector(where)] = self._new(kind, values, (out.shape[0], where.size), generator)

    def _new(
        self, kind: Fill, values: torch.Tensor, shape: tuple[int, int], generator: np.random.Generator
    ) -> torch.Tensor:
        if kind == Fill.FRESH:
            return normal(shape, self.fresh_std, self.dtype, generator)
        if kind == Fill.MEAN:
            return values.to(torch.float64).mean(dim=1, keepdim=True).to(self.dtype).expand(shape)
        return torch.full(shape, self._one if kind == Fill.ONE else 0.0, dtype=self.dtype)

    @property
    def _one(self) -> float:
        """What the file holds where a gain is new."""
        return self.recipe.new_gain - (1.0 if self.recipe.stored_as == "1+w" else 0.0)

    def _fill_rows(self, out: torch.Tensor, lo: int, hi: int, generator: np.random.Generator) -> None:
        """Overwrite the rows of new capacity; where a column is silent as well, zero wins."""
        fill = self.rows.fill[lo:hi]
        if (fill == Fill.COPY).all():
            return
        zero, fresh, one, mean = (np.flatnonzero(fill == k) for k in (Fill.ZERO, Fill.FRESH, Fill.ONE, Fill.MEAN))
        if zero.size:
            out[_selector(zero)] = 0
        if one.size:
            out[_selector(one)] = self._one
        if fresh.size:
            # A bias (one column, nothing read) of a new unit starts at zero, as a fresh layer's does.
            std = self.fresh_std if len(self.recipe.shape) > 1 else 0.0
            drawn = normal((fresh.size, out.shape[1]), std, self.dtype, generator)
            drawn[:, torch.from_numpy(self.columns.fill == Fill.ZERO)] = 0
            out[_selector(fresh)] = drawn
        if mean.size:
            silent = np.flatnonzero(self.columns.fill == Fill.FRESH)
            if silent.size:
                out[torch.from_numpy(mean)[:, None], torch.from_numpy(silent)[None, :]] = 0


def _largest(values: torch.Tensor) -> float:
    """Return max |value|, NaN where there is one: one pass, no temporary of the tensor's size."""
    if values.numel() == 0:
        return 0.0
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf."""
    return isfinite(_largest(values))


def _require_storable(recipe: Recipe, source: torch.Tensor, dtype: torch.dtype) -> None:
    largest = _largest(source)
    if not isfinite(largest):
        raise CheckpointError(
            f"tensor '{recipe.source}' holds NaN or Inf: the checkpoint is damaged; pass --allow-nonfinite to go on"
        )
    # A half and more beyond the largest number rounds to Inf; what lies just below is the last that can be kept.
    if not bool(torch.tensor(largest, dtype=source.dtype).to(dtype).isfinite()):
        raise CheckpointError(
            f"tensor '{recipe.source}' holds values up to {largest:.4g}, which {str(dtype).removeprefix('torch.')} "
            "cannot store: choose a wider --dtype, such as bfloat16"
        )


def target_tensor(
    recipe: Recipe, tensors: TensorSource, maps: DimMaps, seed: int, *, allow_nonfinite: bool = False
) -> torch.Tensor:
    """Return one target tensor in memory; raise CheckpointError for NaN or Inf in what it is made of."""
    job = TensorJob(recipe, tensors.read(recipe.source), maps, seed, allow_nonfinite=allow_nonfinite)
    blocks = [job.block(i) for i in range(job.num_blocks)]
    return (blocks[0] if len(blocks) == 1 else torch.cat(blocks)).reshape(recipe.shape)


def target_tensors(plan: Plan, tensors: TensorSource, *, allow_nonfinite: bool = False) -> dict[str, torch.Tensor]:
    """Return every target tensor of a plan in memory, by name."""
    maps = DimMaps(plan.axes, plan.dense)
    return {r.name: target_tensor(r, tensors, maps, plan.seed, allow_nonfinite=allow_nonfinite) for r in plan.recipes}
