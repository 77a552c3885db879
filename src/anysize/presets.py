"""The growth presets: which map each axis gets, and how readers divide over copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anysize.axis import AxisMap, extend, keep, select, tile
from anysize.config import SourceConfig
from anysize.errors import SizeError, did_you_mean, joined
from anysize.recipe import Share
from anysize.shrink import SHRINK_PRESETS


@dataclass(frozen=True)
class Preset:
    """One way to grow. `copies`: "all" tiles an axis, "one" keeps one copy and adds silent new capacity."""

    name: str
    copies: str
    share: Share
    noisy: bool = False


PRESETS = {
    preset.name: preset
    for preset in (
        # HyperCloning (2409.12903): symmetric, noisy symmetric, diagonal, noisy diagonal.
        Preset("hypercloning", "all", "equal"),
        Preset("hypercloning-noisy", "all", "equal", noisy=True),
        Preset("hypercloning-diagonal", "all", "diagonal"),
        Preset("hypercloning-noisy-diagonal", "all", "diagonal", noisy=True),
        # Equal copies, a random convex share per weight.
        Preset("split", "all", "random"),
        # One copy, new capacity that is silent at first and trainable everywhere.
        Preset("fresh", "one", "random"),
    )
}
AUTO = "fresh"
# New values as large as those beside them train better than a fresh layer's small ones (docs/log.md).
FRESH_SCALE = 1.0


def preset_named(name: str) -> Preset:
    """Return a growth preset; "auto" and every shrink preset grow by `AUTO`.

    Raises SizeError with the nearest name.
    """
    wanted = AUTO if name == "auto" or name in SHRINK_PRESETS else name
    if wanted not in PRESETS:
        known = ["auto", *PRESETS, *SHRINK_PRESETS]
        raise SizeError(f"unknown preset '{name}'{did_you_mean(name, known)}; known: {', '.join(known)}")
    return PRESETS[wanted]


def _norms(config: SourceConfig) -> list[tuple[str, str, bool]]:
    """Return (kind, what it spans, whether it stands on the residual stream) for every norm of the model."""
    return [
        (norm.kind, norm.reads, config.holds(norm.after_sum))
        for norm in config.architecture.norms.values()
        if config.holds(norm.when)
    ]


def has_layer_norm(config: SourceConfig) -> bool:
    """Whether norms over `hidden` subtract the mean, so that a pad has to hold the mean."""
    return any(kind == "layer" and "hidden" in reads for kind, reads, _ in _norms(config))


def has_norm_after_sum(config: SourceConfig) -> bool:
    """Whether a norm stands on the residual stream itself: then no pad and no identity layer is exact."""
    return any(after for _, _, after in _norms(config))


def _hidden(config: SourceConfig, source: int, target: int, preset: Preset, notes: list[str]) -> AxisMap:
    whole = target % source == 0
    if not has_norm_after_sum(config):
        return (
            tile(source, target)
            if whole and preset.copies == "all"
            else extend(source, target, copies=1 if preset.copies == "one" else target // source)
        )
    if not whole:
        raise SizeError(
            f"hidden_size {source} -> {target}: a norm after the residual sum mixes any pad into the stream, so only "
            f"whole copies are exact"
        )
    if preset.copies == "one" and target > source:
        notes.append("hidden is copied with random shares: a norm after the residual sum leaves no silent pad")
    return tile(source, target)


def bound(config: SourceConfig, axis: str) -> bool:
    """Whether a norm's statistics span whole heads (OLMo 2), so that the axis may only be copied evenly."""
    return any(axis in reads.strip("()").split() for _, reads, _ in _norms(config))


def _inner(config: SourceConfig, axis: str, source: int, target: int, preset: Preset, notes: list[str]) -> AxisMap:
    if axis == "expert":
        raise SizeError(
            f"expert {source} -> {target}: copies of an expert would take the places of others among those that the "
            f"router chooses, so each token would be routed otherwise"
        )
    if bound(config, axis):
        if target % source:
            raise SizeError(
                f"{axis} {source} -> {target}: the query and key norms span all heads, so only whole copies keep "
                f"their statistics"
            )
        if preset.copies == "one" and target > source:
            notes.append(f"{axis} is copied with random shares: the query and key norms span all heads")
        return tile(source, target)
    return extend(source, target) if preset.copies == "one" else tile(source, target)


def _cut(axis: str, source: int, target: int) -> AxisMap:
    """Return a map that keeps the first coordinates, as a stand-in until the real choice is made."""
    change = f"{axis} {source} -> {target}"
    if axis == "head":
        raise SizeError(f"{change}: heads are kept or dropped whole, so that positions and scores stay what they are")
    if axis == "vocab":
        raise SizeError(f"{change}: which tokens go cannot be told from a size; name those to keep (--keep-tokens)")
    return select(source, range(target))


def axis_maps(
    config: SourceConfig, sizes: Mapping[str, int], preset: Preset, tokens: AxisMap | None = None
) -> tuple[dict[str, AxisMap], list[str]]:
    """Return one map for every resized axis but `layer`, and notes where an axis departs from the preset.

    `tokens` is the map of `vocab` where tokens are cut.
    Raises SizeError naming every axis that cannot be grown exactly to its size.
    """
    maps: dict[str, AxisMap] = {}
    notes: list[str] = []
    problems: list[str] = []
    for axis, source in config.sizes.items():
        target = sizes[axis]
        if axis == "layer":
            continue
        try:
            if axis == "vocab" and tokens is not None:
                maps[axis] = tokens
            elif target == source:
                maps[axis] = keep(source)
            elif target < source:
                maps[axis] = _cut(axis, source, target)
            elif axis == "hidden":
                maps[axis] = _hidden(config, source, target, preset, notes)
            elif axis == "vocab":
                maps[axis] = extend(source, target)
            else:
                maps[axis] = _inner(config, axis, source, target, preset, notes)
        except SizeError as error:
            problems.append(str(error))
    if problems:
        raise SizeError(joined(problems))
    return maps, notes
