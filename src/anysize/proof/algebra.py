"""Prove the written tensors themselves: sampled rows, folded back over the copies, must give the source's rows.

This reads rows of the real source and of the real output and uses only the maps, not the code that made the shares:
whatever divides over copies must add up, what copies must repeat, and what is new must be silent where it has to be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod

import numpy as np
import torch

from anysize.axis import NEW
from anysize.dims import DimMap, Fill
from anysize.executor import DimMaps, as_matrix
from anysize.io.reader import Checkpoint, TensorInfo, TensorSource, read_bytes
from anysize.notation import parse
from anysize.proof.verdict import Check
from anysize.recipe import Plan, Recipe

ROWS_PER_TENSOR = 4
# Relative to the largest value of a row: half a unit in the last place for each of a few roundings.
TOLERANCE = {"F64": 1e-13, "F32": 2e-6, "BF16": 1e-2, "F16": 1.5e-3}

ReadRows = Callable[[str, int, int], torch.Tensor]


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
    if shape and shape[0] == num_rows:
        return torch.cat([read(name, row, 1).reshape(1, columns) for row in rows]).double()
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


def _sample(rows: DimMap, generator: np.random.Generator) -> list[int]:
    old = np.flatnonzero(rows.index != NEW)
    return sorted(generator.choice(old, size=min(ROWS_PER_TENSOR, old.size), replace=False).tolist())


def _errors(
    recipe: Recipe, maps: DimMaps, source: ReadRows, target: ReadRows, generator: np.random.Generator
) -> Iterator[tuple[float, float]]:
    """Yield (relative error, error against a wrong row) for one tensor's sampled rows."""
    rows, columns = as_matrix(maps.of(recipe), recipe.source_shape)
    sampled = _sample(rows, generator)
    got = _matrix_rows(target, recipe.name, recipe.shape, sampled, rows.target_size)
    if recipe.silent:
        silent = -1.0 if recipe.stored_as == "1+w" else 0.0
        yield float((got - silent).abs().max()), float("nan")
        return
    offset = 1.0 if recipe.stored_as == "1+w" else 0.0
    origin = [int(rows.index[row]) for row in sampled]
    factor = torch.from_numpy(rows.factor[sampled])[:, None] * recipe.factor
    shares = recipe.share != "none"
    if shares and parse(recipe.arrow).reads_first:
        # Here the copies that share one value are rows: compare whole columns of the tensor instead.
        rows, columns = columns, rows
        sampled = _sample(rows, generator)
        origin = [int(rows.index[row]) for row in sampled]
        factor = torch.from_numpy(rows.factor[sampled])[:, None] * recipe.factor
        got = target(recipe.name, 0, recipe.shape[0]).double().T[sampled]
        wanted = source(recipe.source, 0, recipe.source_shape[0]).double().T[origin]
    else:
        wanted = _matrix_rows(source, recipe.source, recipe.source_shape, origin, rows.source_size)
    silent_columns = np.flatnonzero(columns.fill == Fill.ZERO)
    leak = float(got[:, torch.from_numpy(silent_columns)].abs().max()) if silent_columns.size else 0.0
    folded = _folded(got + offset if not shares else got, columns, average=not shares)
    wanted = (wanted + offset) * factor
    scale = wanted.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    error = max(float(((folded - wanted).abs() / scale).max()), leak)
    wrong = float(((folded - wanted.roll(1, dims=1)).abs() / scale).max()) if wanted.shape[1] > 1 else float("nan")
    yield error, wrong


def check_rows(plan: Plan, source: ReadRows, target: ReadRows) -> Check:
    """Return the check over sampled rows of every target tensor; its control holds each row against one shifted by one.

    Memory: a few rows (whole tensors only where the file stores the dim that is shared out first).
    """
    maps = DimMaps(plan.axes)
    generator = np.random.default_rng(plan.seed)
    worst, controls = 0.0, []
    for recipe in plan.recipes:
        allowed = max(TOLERANCE[recipe.dtype], TOLERANCE[recipe.source_dtype])
        for error, wrong in _errors(recipe, maps, source, target, generator):
            worst = max(worst, error / allowed)
            if not np.isnan(wrong):
                controls.append(wrong / allowed)
    return Check(
        name="algebra",
        what=f"{ROWS_PER_TENSOR} rows of each of {len(plan.recipes)} tensors, folded back over their copies",
        unit="of the rounding allowed",
        measured=worst,
        tolerance=1.0,
        # A constant tensor (all gains 1) cannot tell a shifted row, so the control is the typical tensor's.
        control=float(np.median(controls)) if controls else None,
    )
