"""What a plan cuts: from options, sizes and scores to the choice of coordinates, or the sentence why it cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from anysize.axis import AxisMap
from anysize.config import SourceConfig
from anysize.errors import SizeError
from anysize.layers import EVOLUTIONARY, LayerStep
from anysize.presets import PRESETS
from anysize.recipe import Options
from anysize.shrink import (
    CHOSEN_PER_LAYER,
    SHRINK_PRESETS,
    ShrinkPreset,
    why_no_directions,
    why_not_sequential,
)
from anysize.target import Target
from anysize.tensors import num_parameters

if TYPE_CHECKING:
    from anysize.select import Selector


def require_used(options: Options, *, grows: bool, shrinks: bool, drops_layers: bool) -> None:
    """Refuse options that would change nothing: the user meant something else."""
    if options.preset in PRESETS and shrinks and not grows:
        raise SizeError(f"preset '{options.preset}' grows, and every size asked for is below the source's")
    if options.preset in SHRINK_PRESETS and grows and not shrinks:
        raise SizeError(f"preset '{options.preset}' shrinks, and no size asked for is below the source's")
    for name, value in (("select", options.select), ("readers", options.readers)):
        if value != "auto" and not shrinks:
            raise SizeError(f"{name} '{value}': no width is below the source's, so nothing is selected")
    if options.layers == EVOLUTIONARY and not drops_layers:
        raise SizeError(f"layers '{EVOLUTIONARY}': num_hidden_layers is not below the source's, so none is dropped")
    if options.search_tokens != Options().search_tokens and options.layers != EVOLUTIONARY:
        raise SizeError(
            f"search_tokens={options.search_tokens}: the layers '{options.layers}' are not searched for, "
            f"'{EVOLUTIONARY}' ones are"
        )


def selected(
    maps: dict[str, AxisMap],
    selector: Selector,
    steps: tuple[LayerStep, ...],
) -> dict[str, AxisMap]:
    """Return the real choice in place of every cut axis' stand-in; heads and neurons are chosen layer by layer."""
    chosen = dict(maps)
    for axis, stand_in in maps.items():
        if stand_in.target_size >= stand_in.source_size:
            continue
        size = stand_in.target_size
        if axis not in CHOSEN_PER_LAYER:
            chosen[axis] = selector.map(axis, size, None)
            continue
        by_source = {source: selector.map(axis, size, source) for source in sorted({s.source for s in steps})}
        chosen |= {f"{axis}.{layer}": by_source[step.source] for layer, step in enumerate(steps)}
        chosen[axis] = by_source[steps[0].source]
    return chosen


def possible_directions(
    config: SourceConfig, shrink: ShrinkPreset, *, cut_hidden: bool
) -> tuple[ShrinkPreset, list[str]]:
    """Return the preset as far as this family allows it, and what was replaced."""
    why = why_no_directions(config) if shrink.select == "principal" and cut_hidden else ""
    if not why:
        return shrink, []
    return replace(shrink, select="activation"), [f"hidden is selected by activation, not by directions: {why}"]


def sequential_if_possible(
    config: SourceConfig,
    target: Target,
    shrink: ShrinkPreset,
    steps: tuple[LayerStep, ...],
    maps: dict[str, AxisMap],
    *,
    asked: bool,
) -> tuple[ShrinkPreset, list[str]]:
    """Return the preset, with least-squares readers where sequential ones cannot be; refuse if they were asked for."""
    from anysize.proof.whole import fits_in_memory  # noqa: PLC0415

    fits = fits_in_memory(num_parameters(config) + num_parameters(target.config))
    why = why_not_sequential(config, steps, maps, fits_in_memory=fits)
    if not why:
        return shrink, []
    if asked:
        raise SizeError(f"sequential readers follow a stream that is cut and no more, but {why}: use least-squares")
    return replace(shrink, readers="least-squares"), [f"readers are least-squares, not sequential: {why}"]


def cut_reasons(config: SourceConfig, target: Target, shrink: ShrinkPreset) -> list[str]:
    """Return what is cut, and how, as a reason why the target is not exact."""
    changes = [f"{a} {config.sizes[a]} -> {m}" for a, m in target.sizes.items() if a != "layer" and m < config.sizes[a]]
    return [f"{', '.join(changes)}: kept by {shrink.select}, readers {shrink.readers}"]
