"""What a plan cuts: from options, sizes and scores to the choice of coordinates, or the sentence why it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from anysize.arch.schema import is_per_expert
from anysize.axis import AxesAt, AxisMap
from anysize.config import SourceConfig
from anysize.errors import InputError, SizeError
from anysize.io.rows import is_absent
from anysize.layers import EVOLUTIONARY, PATTERNS, LayerStep
from anysize.memory import free_bytes
from anysize.presets import PRESETS, has_norm_after_sum
from anysize.recipe import Options
from anysize.shrink import (
    BY_REMOVAL,
    CHOSEN_PER_LAYER,
    SHRINK_PRESETS,
    ShrinkPreset,
    why_not_sequential,
    why_stream_is_bound,
)
from anysize.target import Target
from anysize.tensors import expected_tensors

if TYPE_CHECKING:
    from anysize.calibration.scores import Scores
    from anysize.select import Selector


def require_used(options: Options, *, grows: bool, cut: Sequence[str], depth: int, tokens: bool = False) -> None:
    """Refuse options that would change nothing: the user meant something else.

    cut: the axes that get smaller, without `vocab`. depth: how many layers are added.
    """
    shrinks, drops_layers = bool(cut), "layer" in cut
    if options.preset != "auto" and tokens and not grows and not shrinks:
        raise SizeError(f"preset '{options.preset}': only tokens are cut, and keep_tokens alone says which")
    if options.preset in PRESETS and shrinks and not grows:
        raise SizeError(f"preset '{options.preset}' grows, and every size asked for is below the source's")
    if options.preset in SHRINK_PRESETS and grows and not shrinks:
        raise SizeError(f"preset '{options.preset}' shrinks, and no size asked for is below the source's")
    for name, value in (("select", options.select), ("readers", options.readers)):
        if value != "auto" and not shrinks:
            raise SizeError(f"{name} '{value}': no width is below the source's, so nothing is selected")
    if cut == ["layer"]:
        if options.select != "auto":
            raise SizeError(f"select '{options.select}': only layers are dropped, and `layers` says which")
        if options.readers not in ("auto", "none", "sequential"):
            raise SizeError(
                f"readers '{options.readers}': only layers are dropped, so no reader loses an input; sequential ones "
                "are fitted to what comes out of the gaps"
            )
    if depth == 0 and options.layers in PATTERNS and options.layers not in ("auto", EVOLUTIONARY):
        raise SizeError(f"layers '{options.layers}': num_hidden_layers stays, so none is dropped or added")
    if options.layers == EVOLUTIONARY and not drops_layers:
        raise SizeError(f"layers '{EVOLUTIONARY}': num_hidden_layers is not below the source's, so none is dropped")
    if options.search_tokens != Options().search_tokens and options.layers != EVOLUTIONARY:
        raise SizeError(
            f"search_tokens={options.search_tokens}: the layers '{options.layers}' are not searched for, "
            f"'{EVOLUTIONARY}' ones are"
        )


def _inside_experts(config: SourceConfig, axis: str) -> bool:
    """Whether only experts have this axis: then its coordinates have nothing in common from one expert to the next."""
    patterns = [name for name, p in config.architecture.parameters.items() if axis in p.parsed.axes]
    return all(is_per_expert(name) for name in patterns)


def selected(
    config: SourceConfig,
    maps: dict[str, AxisMap],
    selector: Selector,
    steps: tuple[LayerStep, ...],
) -> dict[str, AxisMap]:
    """Return the real choice in place of every cut axis' stand-in.

    Experts, heads and neurons are chosen layer by layer, neurons inside experts expert by expert.
    """
    chosen = dict(maps)
    cut = [axis for axis, m in maps.items() if m.target_size < m.source_size and axis != "vocab"]
    # Which experts stay decides whose neurons are chosen.
    for axis in sorted(cut, key=lambda name: name != "expert"):
        size = maps[axis].target_size
        pick = cache(partial(selector.map, axis, size))
        if axis not in CHOSEN_PER_LAYER or not selector.tells_places_apart:
            chosen[axis] = pick(None)
            continue
        chosen[axis] = pick(steps[0].source)
        for layer, step in enumerate(steps):
            if not _inside_experts(config, axis):
                chosen[f"{axis}.{layer}"] = pick(step.source)
                continue
            for expert, source in enumerate(AxesAt(chosen, layer)["expert"].index):
                chosen[f"{axis}.{layer}.{expert}"] = pick(step.source, int(source))
    return chosen


def left_out(
    config: SourceConfig, names: Mapping[str, str], steps: Sequence[LayerStep], axes: Mapping[str, AxisMap]
) -> dict[str, str]:
    """Return the tensors (by their names in the file) whose layer or expert the target has no place for, with why."""
    layers = {step.source for step in steps}
    experts: set[tuple[int, int]] = set()
    if "expert" in axes:
        for layer, step in enumerate(steps):
            experts |= {(step.source, int(expert)) for expert in AxesAt(axes, layer)["expert"].index}
    found: dict[str, str] = {}
    for name, expected in expected_tensors(config).items():
        layer, expert = expected.layer, expected.expert
        if layer is not None and layer not in layers:
            found[names[name]] = "its layer is not in the layer plan"
        elif layer is not None and expert is not None and (layer, expert) not in experts:
            found[names[name]] = "its expert is not kept"
    return found


def unfitted_experts(config: SourceConfig, target: Target, scores: Scores, shrink: ShrinkPreset) -> list[str]:
    """Return notes where too few calibration tokens reached experts to choose their neurons, or fit what reads them."""
    from anysize.calibration.sites import sites  # noqa: PLC0415

    inside = [
        site.name
        for site in sites(config).values()
        if site.side == "in" and site.expert is not None and "ffn" in site.dim.axes
    ]
    notes: list[str] = []
    unseen = sum(not scores.of(name, "abs").any() for name in inside)
    if unseen:
        notes.append(
            f"no calibration token was routed to {unseen} of {len(inside)} experts: nothing is known of their "
            "neurons, and what reads these is not fitted"
        )
    # Families with experts have no sequential readers.
    fits, removes = shrink.readers == "least-squares", shrink.select in BY_REMOVAL
    if (fits or removes) and scores.record.second_moments:
        kept = target.sizes["ffn"]
        few = sum(0 < float(scores.of(name, "samples")) <= kept for name in inside)
        if few:
            lost = ["which of their neurons stay is little more than a guess"] if removes else []
            lost += ["what reads these is not fitted"] if fits else []
            notes.append(
                f"no more calibration tokens than the {kept:,} neurons they keep were routed to {few} of {len(inside)} "
                f"experts: {', and '.join(lost)}; calibrate with more tokens"
            )
    return notes


def unfitted_readers(config: SourceConfig, target: Target, readers: str) -> list[str]:
    """Return notes on what is read as it was, though readers are fitted."""
    before, after = config.sizes, target.sizes
    notes: list[str] = []
    if after["hidden"] < before["hidden"] and has_norm_after_sum(config):
        notes.append(
            f"what reads hidden is read as it was, not fitted ({readers}): a norm stands on the residual stream itself"
        )
    heads = ("kv", "group", "head")
    cut, grown = [a for a in heads if after[a] < before[a]], [a for a in heads if after[a] > before[a]]
    if cut and grown:
        notes.append(
            f"what reads heads is read as it was, not fitted ({readers}): {', '.join(cut)} shrinks and "
            f"{', '.join(grown)} grows"
        )
    return notes


def possible_directions(
    config: SourceConfig, shrink: ShrinkPreset, *, cut_hidden: bool
) -> tuple[ShrinkPreset, list[str]]:
    """Return the preset as far as this family allows it, and what was replaced."""
    why = why_stream_is_bound(config) if shrink.select == "principal" and cut_hidden else ""
    if not why:
        return shrink, []
    return replace(shrink, select="refit"), [f"hidden is selected by activation, not by directions: {why}"]


def sequential_if_possible(
    config: SourceConfig,
    target: Target,
    shrink: ShrinkPreset,
    steps: tuple[LayerStep, ...],
    maps: dict[str, AxisMap],
    scores: Scores,
    *,
    asked: bool,
    speaks: bool,
) -> tuple[ShrinkPreset, list[str]]:
    """Return the preset, with least-squares readers where sequential ones cannot be; refuse if they were asked for.

    `speaks`: whether there is a tokenizer for the target, which its own activations need.
    """
    from anysize.sequential import working_bytes  # noqa: PLC0415 - it needs torch

    fits = working_bytes(config, target.config, scores.record) <= free_bytes() / 2
    why = why_not_sequential(config, steps, maps, fits_in_memory=fits)
    why = why if speaks else "tokens are cut of a model without a tokenizer"
    if not why and is_absent(data := scores.record.data):
        if asked:
            raise InputError(
                f"sequential readers read the data of the scores again, and '{data}' do not exist: put them there, or "
                "use least-squares"
            )
        why = f"they read the data of the scores again, and '{data}' do not exist"
    if not why:
        return shrink, []
    if asked:
        raise SizeError(f"sequential readers follow a stream that is cut and no more, but {why}: use least-squares")
    return replace(shrink, readers="least-squares"), [f"readers are least-squares, not sequential: {why}"]


def cut_reasons(config: SourceConfig, target: Target, shrink: ShrinkPreset) -> list[str]:
    """Return what is cut, and how, as a reason why the target is not exact."""
    changes = [
        f"{a} {config.sizes[a]} -> {m}"
        for a, m in target.sizes.items()
        if a not in ("layer", "vocab") and m < config.sizes[a]
    ]
    # Where only layers go, nothing is chosen inside of them.
    kept = f"{', '.join(changes)}: kept by {shrink.select}, " if changes else ""
    return [f"{kept}readers {shrink.readers}"]
