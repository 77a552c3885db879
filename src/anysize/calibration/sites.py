"""Sites: where activations are captured, derived from a family's table. The same names serve weights and activations.

A parameter that reads a dim gives the site `<module>:in`, one that writes the residual stream `<module>:out`, one that
writes `expert` `<module>:route` (the weight that each expert gets, 0 where it is not chosen), and a norm over the
stream `<module>:norm` (its input over its own RMS, before the gain). Where a norm ends each branch, the norm is what
writes the stream, and what it reads is `<module>:branch` of the parameter before it. Nothing is declared twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from anysize.arch.schema import AXES, Norm, is_per_layer, tensor_name
from anysize.config import SourceConfig
from anysize.notation import Dim, parse
from anysize.tensors import expected_tensors


@dataclass(frozen=True)
class Site:
    """One place in the model: the module, which side of it, the dim that is seen there, its layer and expert.

    `part`: the parameter of the module that is itself what is written (a class token, positions), "" for what the
    module gives.
    """

    module: str
    side: str
    dim: Dim
    layer: int | None
    expert: int | None = None
    part: str = ""

    @property
    def name(self) -> str:
        return f"{self.module}.{self.part}:{self.side}" if self.part else f"{self.module}:{self.side}"

    @property
    def is_norm(self) -> bool:
        return self.side == "norm"


def _has_activations(reads: tuple[Dim, ...]) -> bool:
    """Whether what a parameter reads is one dim of named axes; an embedding reads `vocab`, which has no activations."""
    factors = [factor for dim in reads for block in dim.blocks for factor in block.factors]
    return len(reads) == 1 and all(f.fixed is None and f.axis in AXES and f.axis != "vocab" for f in factors)


def sites(config: SourceConfig) -> dict[str, Site]:
    """Return every site of a model by name, in the order of its table."""
    found: list[Site] = []
    ends = branch_ends(config)
    for expected in expected_tensors(config).values():
        module, _, part = expected.name.rpartition(".")
        if part == "bias" or isinstance(expected.origin, Norm):
            continue
        arrow = expected.arrow
        if part == "weight" and expected.layer is not None and _has_activations(arrow.reads):
            found.append(Site(module, "in", arrow.reads[0], expected.layer, expected.expert))
        sides = {"hidden": "branch" if ends and expected.layer is not None else "out", "expert": "route"}
        side = sides.get(str(arrow.writes[0])) if len(arrow.writes) == 1 else None
        if side is not None:
            own = "" if part == "weight" else part
            found.append(Site(module, side, arrow.writes[0], expected.layer, expected.expert, own))
    found += [*_at_norms(config, "hidden", "out"), *norm_sites(config)]
    return {site.name: site for site in found}


def widest_site(sizes: Mapping[str, int]) -> int:
    """Return how many numbers a token has where it has most: in the stream, the neurons or the heads."""
    return max(sizes["hidden"], sizes["ffn"], sizes["kv"] * sizes["group"] * sizes["head"])


def norm_sites(config: SourceConfig) -> list[Site]:
    """Return the site of every norm that opens a branch or stands before the head, stored gain or not."""
    return list(_at_norms(config, "norm(hidden)", "norm"))


def branch_ends(config: SourceConfig) -> list[str]:
    """Return the patterns of the norms that end a branch of a layer, in the order in which these are run."""
    return [
        pattern
        for pattern, norm in config.architecture.norms.items()
        if norm.writes == "hidden" and is_per_layer(pattern) and config.holds(norm.when)
    ]


def _at_norms(config: SourceConfig, writes: str, side: str) -> Iterator[Site]:
    """Yield a site at every norm that writes this dim."""
    (hidden,) = parse("-> hidden").writes
    for pattern, norm in config.architecture.norms.items():
        if norm.writes == writes and config.holds(norm.when):
            for layer in range(config.sizes["layer"]) if is_per_layer(pattern) else (None,):
                yield Site(tensor_name(pattern, layer), side, hidden, layer)


def layer_paths(config: SourceConfig, paths: Mapping[str, str]) -> list[str]:
    """Return the path in memory of each layer: what the paths of the modules in it have in common."""
    found: list[str] = []
    for layer in range(config.sizes["layer"]):
        modules = [e.name.rpartition(".")[0] for e in expected_tensors(config).values() if e.layer == layer]
        split = [paths[module].split(".") for module in modules if module in paths]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*split, strict=False))
        found.append(".".join(parts[0] for parts in shared))
    return found
