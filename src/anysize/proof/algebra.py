"""Prove the written tensors themselves: sampled rows, folded back over the copies, must give the source's rows.

This reads rows of the real source and of the real output and uses only the maps, not the code that made the shares:
whatever divides over copies must add up, what copies must repeat, and what is new must be silent where it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np
import torch

from anysize.axis import NEW, Index
from anysize.dims import DimMap, Fill
from anysize.executor import ROWS_OF_A_SUM, DimMaps, as_matrix
from anysize.io.reader import Checkpoint, ReadRows, TensorInfo, TensorSource, read_bytes
from anysize.notation import parse
from anysize.proof.verdict import Check
from anysize.recipe import Plan, Recipe

ROWS_PER_TENSOR = 4
WHOLE_ITEMS = 1 << 18
# Relative to the largest value of a row: half a unit in the last place for each of a few roundings.
TOLERANCE = {"F64": 1e-13, "F32": 2e-6, "BF16": 1e-2, "F16": 1.5e-3}


def rows_from_files(places: Mapping[str, TensorInfo]) -> ReadRows:
    """Return a function (name, first row of the first stored dim, count) -> those rows, read from disk."""
    return lambda name, first, count: read_bytes(places[name], first, count)


def rows_of(tensors: TensorSource) -> ReadRows:
    """Return the same for a source: from its files, or from the tensors of a model in memory."""
    if isinstance(tensors, Checkpoint):
        return rows_from_files(tensors.tensors)
    return lambda name, first, count: tensors.read(name)[first : first + count] if count else tensors.read(name)


def _matrix_rows(read: ReadRows, name: str, shape: tuple[int, ...], rows: list[int], num_rows: int) -> torch.Tensor:
    """Return rows of a tensor seen as a matrix of `num_rows` rows, in double precision."""
    columns = prod(shape) // num_rows
    if shape and shape[0] == num_rows and len(rows) <= ROWS_PER_TENSOR:
        found = [read(name, row, 1).reshape(1, columns) for row in rows]
        return torch.cat([torch.empty(0, columns), *found]).double()
    return read(name, 0, shape[0] if shape else 1).reshape(num_rows, columns)[rows].double()


def _folded(values: torch.Tensor, columns: DimMap, *, average: bool) -> torch.Tensor:
    """Sum (or average, for what repeats) the columns over the copies of each source column."""
    old = np.flatnonzero(columns.index != NEW)
    index = torch.from_numpy(columns.index[old])
    folded = torch.zeros(values.shape[0], columns.source_size, dtype=torch.float64)
    folded.index_add_(1, index, values[:, torch.from_numpy(old)] / torch.from_numpy(columns.factor[old]))
    if average:
        counts = torch.bincount(index, minlength=columns.source_size).clamp(min=1)
        folded /= counts
    return folded


def _sample(rows: DimMap, columns: DimMap, fill: Fill, generator: np.random.Generator) -> list[int]:
    """Return the rows with this fill that are looked at: all rows of a small tensor, a few of a large one."""
    found = np.flatnonzero(rows.fill == fill)
    if rows.target_size * columns.target_size <= WHOLE_ITEMS:
        return found.tolist()
    return sorted(generator.choice(found, size=min(ROWS_PER_TENSOR, found.size), replace=False).tolist())


def _largest(values: torch.Tensor) -> float:
    """Return max |value|, where NaN counts as infinite: no comparison may pass by being undefined."""
    return float(values.abs().nan_to_num(nan=torch.inf).max()) if values.numel() else 0.0


def _cut(dim: DimMap) -> Index:
    """Return which source coordinates stand nowhere in the target."""
    return np.flatnonzero(np.bincount(dim.index[dim.index != NEW], minlength=dim.source_size) == 0)


def _errors(
    recipe: Recipe, maps: DimMaps, source: ReadRows, target: ReadRows, generator: np.random.Generator
) -> tuple[float, float]:
    """Return (relative error, error against wrong rows) of one tensor's sampled rows."""
    rows, columns = as_matrix(maps.of(recipe), recipe.source_shape)
    shares, offset = recipe.share != "none", 1.0 if recipe.stored_as == "1+w" else 0.0
    # Where the file stores the read dim first, the copies that share a value are rows: compare its columns instead.
    turned = shares and parse(recipe.arrow).reads_first
    if turned:
        rows, columns = columns, rows

    def read(tensor: ReadRows, name: str, shape: tuple[int, ...], which: list[int], num_rows: int) -> torch.Tensor:
        if turned:
            return tensor(name, 0, shape[0]).double().T[which]
        return _matrix_rows(tensor, name, shape, which, num_rows)

    sampled = _sample(rows, columns, Fill.COPY, generator)
    got = read(target, recipe.name, recipe.shape, sampled, rows.target_size)
    if recipe.silent:
        return _largest(got + offset), float("nan")
    origin = [int(rows.index[row]) for row in sampled]
    wanted = read(source, recipe.source, recipe.source_shape, origin, rows.source_size)
    wanted = (wanted + offset) * torch.from_numpy(rows.factor[sampled])[:, None] * recipe.factor
    # What the source itself does not define (NaN and Inf, on request) is nothing to compare with.
    defined = wanted.isfinite()
    wanted = wanted.where(defined, 0.0)
    scale = wanted.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    folded = _folded(got if shares else got + offset, columns, average=not shares).where(defined, 0.0)
    # What is cut is read by nothing: there is nothing to fold it back from.
    wanted[:, _cut(columns)] = 0.0
    error = _largest((folded - wanted) / scale)
    silent_rows = read(
        target, recipe.name, recipe.shape, _sample(rows, columns, Fill.ZERO, generator), rows.target_size
    )
    if _largest(silent_rows) or _largest(got[:, torch.from_numpy(columns.fill == Fill.ZERO)]):
        error = max(error, 1.0)
    new_rows = read(target, recipe.name, recipe.shape, _sample(rows, columns, Fill.ONE, generator), rows.target_size)
    error = max(error, _largest(new_rows + offset - recipe.new_gain) / recipe.new_gain)
    error = max(error, _mean_error(recipe, rows, columns, got, wanted, scale, read, source, target, generator))
    return error, _largest((folded - wanted.roll(1, dims=1)) / scale) if wanted.shape[1] > 1 else float("nan")


def _mean_error(
    recipe: Recipe,
    rows: DimMap,
    columns: DimMap,
    got: torch.Tensor,
    wanted: torch.Tensor,
    scale: torch.Tensor,
    read: Callable[..., torch.Tensor],
    source: ReadRows,
    target: ReadRows,
    generator: np.random.Generator,
) -> float:
    """Return the error of the cells that hold means: pad columns of sampled rows, and pad rows themselves."""
    offset = 1.0 if recipe.stored_as == "1+w" else 0.0
    error = 0.0
    across = torch.from_numpy(columns.fill == Fill.MEAN)
    if across.any() and columns.source_size:
        error = _largest((got[:, across] + offset - wanted.mean(1, keepdim=True)) / scale)
    sampled = _sample(rows, columns, Fill.MEAN, generator)
    if sampled:
        total, size_of_all = torch.zeros(1, columns.source_size, dtype=torch.float64), 0.0
        # A part at a time: an embedding is a large part of its model.
        for begin in range(0, rows.source_size, ROWS_OF_A_SUM):
            part = range(begin, min(begin + ROWS_OF_A_SUM, rows.source_size))
            values = read(source, recipe.source, recipe.source_shape, list(part), rows.source_size)
            total += values.sum(0, keepdim=True)
            size_of_all += float(values.abs().sum())
        mean = (total / rows.source_size + offset) * recipe.factor
        average = size_of_all / max(1, rows.source_size * columns.source_size)
        # As in every other row, what is cut is read by nothing.
        mean[:, _cut(columns)] = 0.0
        made = read(target, recipe.name, recipe.shape, sampled, rows.target_size) + offset
        shares = recipe.share != "none"
        folded = _folded(made, columns, average=not shares)
        size = mean.abs().max().clamp(min=1e-30)
        error = max(error, _largest((folded - mean) / size.clamp(min=average)))
    return error


def _dense_errors(
    recipe: Recipe, maps: DimMaps, source: ReadRows, target: ReadRows, generator: np.random.Generator
) -> tuple[float, float]:
    """Return the same for a tensor that went through matrices: sampled entries against sums written out one by one."""
    got = target(recipe.name, 0, recipe.shape[0]).double().reshape(recipe.shape)
    offset = 1.0 if recipe.stored_as == "1+w" else 0.0
    if recipe.silent:
        return _largest(got + offset), float("nan")
    if recipe.value:
        wanted = (torch.from_numpy(maps.dense[recipe.value]).double() + offset) * recipe.factor - offset
        scale = float(wanted.abs().max().clamp(min=1e-30))
        return _largest(got - wanted) / scale, _largest(got - wanted.flip(0)) / scale
    values = source(recipe.source, 0, recipe.source_shape[0]).double().reshape(recipe.source_shape).numpy()
    arrow = parse(recipe.arrow)
    last = len(recipe.shape) - 1
    reads, writes = (0, last) if arrow.reads_first else (last, 0)
    sides: dict[int, np.ndarray] = {}
    if recipe.reader:
        sides[reads] = maps.dense[recipe.reader].T
    if recipe.writer:
        sides[writes] = maps.dense[recipe.writer]
    composed = maps.of(recipe)
    errors: list[float] = []
    wrongs: list[float] = []
    largest = float(got.abs().max().clamp(min=1e-30))
    for _ in range(ROWS_PER_TENSOR * 8):
        at = tuple(int(generator.integers(size)) for size in recipe.shape)
        # What is taken by its index comes first: then little is left to be summed.
        kept = {p: composed[p].index[at[p]] for p in range(last + 1) if p not in sides}
        if NEW in kept.values():
            continue
        own = values[tuple(slice(kept[p], kept[p] + 1) if p in kept else slice(None) for p in range(last + 1))]
        term, shifted = own, own
        for position in range(last, -1, -1):
            if position in sides:
                weights = sides[position][at[position]].astype(np.float64)
                term = np.tensordot(term, weights, (position, 0))
                shifted = np.tensordot(shifted, np.roll(weights, 1), (position, 0))
            else:
                factor = composed[position].factor[at[position]]
                term, shifted = (np.take(v, 0, axis=position) * factor for v in (term, shifted))
        found = got[at]
        if recipe.share != "none" and reads not in sides:
            # Copies share what the source reads there: together they hold it.
            copies = np.flatnonzero(composed[reads].index == composed[reads].index[at[reads]])
            found = got[tuple(copies if i == reads else at[i] for i in range(len(at)))].sum()
        errors.append(abs(float(found) - float(term) * recipe.factor) / largest)
        wrongs.append(abs(float(found) - float(shifted) * recipe.factor) / largest)
    return max(errors, default=0.0), max(wrongs, default=float("nan"))


def check_rows(plan: Plan, source: ReadRows, target: ReadRows) -> Check:
    """Return the check over sampled rows of every target tensor; its control holds each row against one shifted by one.

    Memory: a few rows, or a whole tensor where it is small or stores the dim that is shared out first.
    """
    maps = DimMaps(plan.axes, plan.dense)
    generator = np.random.default_rng(plan.seed)
    worst, controls = 0.0, []
    for recipe in plan.recipes:
        allowed = max(TOLERANCE[recipe.dtype], TOLERANCE[recipe.source_dtype])
        dense = recipe.reader or recipe.writer or recipe.value
        error, wrong = (_dense_errors if dense else _errors)(recipe, maps, source, target, generator)
        worst = max(worst, error / allowed)
        if not np.isnan(wrong):
            controls.append(wrong / allowed)
    return Check(
        name="algebra",
        what=f"rows of each of {len(plan.recipes)} tensors, folded back over their copies",
        unit="of the rounding allowed",
        measured=worst,
        tolerance=1.0,
        # A constant tensor (all gains 1) cannot tell a shifted row, so the control is the typical tensor's.
        control=float(np.median(controls)) if controls else None,
    )
