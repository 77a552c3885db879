"""Which tensors a config implies: names, arrows and shapes, from the table alone, without building a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from anysize.arch.schema import Norm, Parameter, is_per_layer, layer_name
from anysize.config import SourceConfig
from anysize.notation import Arrow, Dim, parse


@dataclass(frozen=True)
class Expected:
    """One tensor that the config implies: where it comes from in the table and, for a per-layer one, its layer.

    `origin` is the parameter or the norm; `part` is "weight" or "bias" for a norm, "" for a parameter.
    """

    name: str
    pattern: str
    arrow: Arrow
    origin: Parameter | Norm
    part: str
    layer: int | None


def _patterns(config: SourceConfig) -> Iterator[tuple[str, Arrow, Parameter | Norm, str]]:
    architecture = config.architecture
    tied = set(architecture.tied) if config.tied else set[str]()
    for pattern, parameter in architecture.parameters.items():
        # Two patterns may share a name under disjoint conditions; the part after '|' tells them apart in the table.
        name = pattern.partition("|")[0]
        if name not in tied and config.holds(parameter.when):
            yield name, parameter.parsed, parameter, ""
    for pattern, norm in architecture.norms.items():
        if not config.holds(norm.when) or not config.holds(norm.stored):
            continue
        yield f"{pattern}.weight", parse(f"-> {norm.writes}"), norm, "weight"
        if config.holds(norm.bias):
            yield f"{pattern}.bias", parse(f"-> {norm.writes}"), norm, "bias"


def expected_tensors(config: SourceConfig) -> dict[str, Expected]:
    """Return name -> Expected for every tensor that a checkpoint with this config holds."""
    num_layers = config.sizes["layer"]
    found: dict[str, Expected] = {}
    for pattern, arrow, origin, part in _patterns(config):
        layers = range(num_layers) if is_per_layer(pattern) else (None,)
        for layer in layers:
            name = pattern if layer is None else layer_name(pattern, layer)
            found[name] = Expected(name, pattern, arrow, origin, part, layer)
    return found


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of coordinates of one stored dim."""
    return sum(prod(f.fixed if f.fixed is not None else sizes[f.axis] for f in block.factors) for block in dim.blocks)


def shape_of(arrow: Arrow, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the stored shape of a parameter."""
    return tuple(dim_size(dim, sizes) for dim in arrow.dims)


def num_parameters(config: SourceConfig) -> int:
    """Return how many numbers a checkpoint with this config holds; tied tensors count once."""
    sizes = config.sizes
    num_layers = sizes["layer"]
    return sum(
        prod(shape_of(arrow, sizes)) * (num_layers if is_per_layer(pattern) else 1)
        for pattern, arrow, _, _ in _patterns(config)
    )
