"""Which tensors a config implies: names, arrows and shapes, from the table alone, without building a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from anysize.arch.schema import Norm, Parameter, is_per_expert, is_per_layer, tensor_name
from anysize.axis import AxesAt, AxisMap
from anysize.config import SourceConfig
from anysize.layers import LayerStep
from anysize.notation import Arrow, Dim, parse


@dataclass(frozen=True)
class Expected:
    """One tensor that the config implies: where it comes from in the table, and its layer and expert, if any.

    `origin` is the parameter or the norm; `part` is "weight" or "bias" for a norm, "" for a parameter.
    """

    name: str
    pattern: str
    arrow: Arrow
    origin: Parameter | Norm
    part: str
    layer: int | None
    expert: int | None = None


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
    found: dict[str, Expected] = {}
    for pattern, arrow, origin, part in _patterns(config):
        layers = range(config.sizes["layer"]) if is_per_layer(pattern) else (None,)
        experts = range(config.sizes["expert"]) if is_per_expert(pattern) else (None,)
        for layer, expert in product(layers, experts):
            name = tensor_name(pattern, layer, expert)
            found[name] = Expected(name, pattern, arrow, origin, part, layer, expert)
    return found


def stored_source(
    expected: Expected, steps: Sequence[LayerStep], axes: Mapping[str, AxisMap], names: Mapping[str, str],
    config: SourceConfig,
) -> str:  # fmt: skip
    """Return the tensor in the file that a target tensor is made of: of a head that was tied, the embedding."""
    wanted = made_from(expected, steps, axes)
    return names[wanted if wanted in names else config.architecture.tied.get(wanted, wanted)]


def made_from(expected: Expected, steps: Sequence[LayerStep], axes: Mapping[str, AxisMap]) -> str:
    """Return the name of the source tensor that a target tensor is made of: its layer and expert choose where from."""
    if expected.layer is None:
        return expected.name
    expert = expected.expert
    if expert is not None:
        expert = int(AxesAt(axes, expected.layer)["expert"].index[expert])
    return tensor_name(expected.pattern, steps[expected.layer].source, expert)


def dim_size(dim: Dim, sizes: Mapping[str, int]) -> int:
    """Return the number of coordinates of one stored dim."""
    return sum(prod(f.fixed if f.fixed is not None else sizes[f.axis] for f in block.factors) for block in dim.blocks)


def shape_of(arrow: Arrow, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the stored shape of a parameter."""
    return tuple(dim_size(dim, sizes) for dim in arrow.dims)


def num_parameters(config: SourceConfig) -> int:
    """Return how many numbers a checkpoint with this config holds; tied tensors count once."""
    return sum(_counted(config).values())


def _counted(config: SourceConfig, experts: int | None = None) -> dict[tuple[str, Arrow], int]:
    """Return the numbers of every pattern, by the pattern and its arrow; of so many experts, or of all."""
    sizes = config.sizes
    return {
        (pattern, arrow): prod(shape_of(arrow, sizes))
        * (sizes["layer"] if is_per_layer(pattern) else 1)
        * ((sizes["expert"] if experts is None else experts) if is_per_expert(pattern) else 1)
        for pattern, arrow, _, _ in _patterns(config)
    }


def multiplied(config: SourceConfig) -> Iterator[tuple[Arrow, int]]:
    """Yield the arrow and the number of weights of every pattern that a token is multiplied with.

    Tables in which rows are looked up are left out, unless the head is tied to them, and biases and norms; of experts,
    those count that a token goes to.
    """
    active = int(config.full.get("num_experts_per_tok") or config.sizes["expert"]) if "expert" in config.sizes else None
    for (_, arrow), count in _counted(config, active).items():
        reads = {axis for dim in arrow.reads for axis in dim.axes}
        if reads and "position" not in reads and (config.tied or "vocab" not in reads):
            yield arrow, count
