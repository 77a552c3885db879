"""Make a plan: config and tensor headers in, one recipe for every target tensor out. No weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anysize import __version__
from anysize.axis import AxisMap
from anysize.config import SourceConfig, understand
from anysize.cutting import (
    cut_reasons,
    left_out,
    possible_directions,
    require_used,
    selected,
    sequential_if_possible,
    unfitted_experts,
    unfitted_readers,
)
from anysize.dense import DenseMaps, Fitted
from anysize.depth import depth_plan, per_layer_lists, require_pattern
from anysize.errors import SizeError
from anysize.expert_rows import odd_rows
from anysize.io.reader import TensorSource
from anysize.layers import LayerStep, layer_plan
from anysize.memory import fits_in_memory
from anysize.presets import Preset, axis_maps, preset_named
from anysize.progress import Progress, quiet
from anysize.proof.coverage import account, check_source
from anysize.recipe import BYTES, Options, Plan, Recipe, Source
from anysize.samples import few_samples, require_samples
from anysize.shrink import FITTED, ShrinkPreset, reads_scores, shrink_preset
from anysize.stream_scale import require_stream_scale, scaled
from anysize.target import Target, resolve_or_suggest, untied
from anysize.tensor_recipes import Recipes
from anysize.tensors import num_parameters
from anysize.vocabulary.ids import target_ids

if TYPE_CHECKING:
    from anysize.calibration.evolution import Found
    from anysize.calibration.scores import Scores
    from anysize.fit import Fit
    from anysize.vocabulary.keep import KeptTokens


def _inexact(config: SourceConfig, target: Target) -> list[str]:
    source, wanted = config.sizes.get("vocab", 0), target.sizes.get("vocab", 0)
    if wanted == source:
        return []
    if wanted < source:
        return [f"vocab_size {source} -> {wanted}: the kept tokens' logits are kept, but share all the probability"]
    return [f"vocab_size {source} -> {wanted}: old logits are kept, but the new tokens take probability from the old"]


def _rounding(recipes: tuple[Recipe, ...]) -> list[str]:
    """Return a note where the target is stored more coarsely than the source: exact up to that rounding only."""
    rounded = {
        f"{r.source_dtype} -> {r.dtype}"
        for r in recipes
        if r.source_dtype != r.dtype and (BYTES[r.dtype] < BYTES[r.source_dtype] or r.dtype in ("BF16", "F16"))
    }
    return [f"stored as {', '.join(sorted(rounded))}: exact up to that rounding"] if rounded else []


def maps_plan(tensors: TensorSource, maps: dict[str, AxisMap], target: Target | None = None) -> Plan:
    """Return the plan that carries out given maps, at equal sizes unless there is a target: what proves the tables."""
    config = understand(tensors.config)
    names, dropped = check_source(config, tensors)
    options = Options(preset="hypercloning")
    steps = layer_plan(config.sizes["layer"], config.sizes["layer"], "identity")
    target = target or Target(config.sizes, config)
    made = Recipes(config, target, preset_named(options.preset), options, steps, maps, names, tensors)
    dropped |= left_out(config, names, steps, maps)
    return _plan(made, made.all(), dict(target.config.raw), dropped, (), ())


def recipes_with_maps(plan: Plan, tensors: TensorSource) -> tuple[tuple[Recipe, ...], dict[str, str]]:
    """Return the recipes, and what is dropped, that a plan's own maps and fitted tensors stand for."""
    config, target = understand(tensors.config), understand(plan.target_config)
    names, dropped = check_source(config, tensors)
    fields = ("reader", "writer", "value")
    fitted = Fitted(
        fields={
            recipe.name: {name: getattr(recipe, name) for name in fields} | ({"factor": 1.0} if recipe.value else {})
            for recipe in plan.recipes
            if recipe.reader or recipe.writer or recipe.value
        }
    )
    made = Recipes(
        config,
        Target(target.sizes, target),
        preset_named(plan.options.preset),
        plan.options,
        plan.layers,
        plan.axes,
        names,
        tensors,
        shrink_preset(plan.options, has_scores=True),
        fitted,
    )
    recipes, _, _ = scaled(made.all(), target, {}, plan.options.stream_scale)
    return recipes, dropped | left_out(config, names, plan.layers, plan.axes)


def _plan(
    made: Recipes,
    recipes: tuple[Recipe, ...],
    target_raw: dict[str, Any],
    dropped: dict[str, str],
    notes: tuple[str, ...],
    inexact: tuple[str, ...],
) -> Plan:
    tensors, config = made.tensors, made.config
    plan = Plan(
        anysize_version=__version__,
        source=Source(
            location=tensors.location, config_sha256=tensors.config_sha256, headers_sha256=tensors.headers_sha256
        ),
        model_type=config.architecture.model_type,
        model_class=config.model_class,
        options=made.resolved_options,
        source_config=dict(config.raw),
        target_config=target_raw,
        axes=made.axes,
        layers=made.steps,
        recipes=recipes,
        dropped=dropped,
        notes=notes,
        inexact=inexact,
        dense_sha256=(dense := DenseMaps(made.fitted.dense)).sha256,
        dense=dense,
    )
    account(plan, tensors)
    return plan


def legality(config: SourceConfig, options: Options, tokens: KeptTokens | None = None) -> Callable[[Target], None]:
    """Return the check that a target can be made from a source with these options; it raises SizeError."""
    preset = preset_named(options.preset)

    def check(target: Target) -> None:
        axis_maps(config, target.sizes, preset, None if tokens is None else tokens.axis)

    return check


@dataclass(frozen=True)
class _Asked:
    """A request that is understood and legal, before anything of the source is looked at but its headers.

    cut: the axes that get smaller, without `vocab`: tokens are cut by name, everything else by what the source does.
    unused: why the scores that lie ready are not used; empty where they are, or where there are none.
    chosen: whether something but layers is cut, so that it has to be chosen what stays.
    """

    tensors: TensorSource
    options: Options
    tokens: KeptTokens | None
    config: SourceConfig
    target: Target
    preset: Preset
    shrink: ShrinkPreset | None
    names: Mapping[str, str]
    dropped: Mapping[str, str]
    cut: tuple[str, ...]
    maps: dict[str, AxisMap]
    notes: tuple[str, ...]
    unused: str
    low_memory: bool

    @property
    def chosen(self) -> bool:
        return self.cut != ("layer",)


def _understood(
    tensors: TensorSource, request: Mapping[str, int], options: Options, tokens: KeptTokens | None, *,
    scored: bool, measures: bool, low_memory: bool,
) -> _Asked:  # fmt: skip
    """Return what is asked for; refuse everything that headers alone show to be impossible or without effect."""
    config = understand(tensors.config)
    preset = preset_named(options.preset)
    if options.noise_db != Options().noise_db and not preset.noisy:
        raise SizeError(f"noise_db={options.noise_db:g}: the preset '{preset.name}' adds no noise, a noisy one does")
    names, dropped = check_source(config, tensors)
    check = legality(config, options, tokens)
    target = resolve_or_suggest(config, request, check)
    if options.untie:
        target = untied(config, target)
    require_stream_scale(target.config, options.stream_scale)
    cut = tuple(a for a, size in target.sizes.items() if a != "vocab" and size < config.sizes[a])
    grows = any(size > config.sizes[a] for a, size in target.sizes.items())
    depth = target.sizes["layer"] - config.sizes["layer"]
    require_used(options, grows=grows, cut=list(cut), depth=depth, tokens=tokens is not None)
    unused = _unused_scores(
        options, cut, scored=scored, measures=measures, tokens=tokens is not None, low_memory=low_memory
    )
    maps, notes = axis_maps(config, target.sizes, preset, None if tokens is None else tokens.axis)
    notes = (*notes, *odd_rows(config, target, request, options, tensors, names, check))
    shrink = shrink_preset(options, has_scores=scored, chooses=cut != ("layer",)) if cut else None
    require_pattern(config, target, options.layers)
    return _Asked(
        tensors=tensors, options=options, tokens=tokens, config=config, target=target, preset=preset, shrink=shrink,
        names=names, dropped=dropped, cut=cut, maps=maps, notes=(*notes, *(() if tokens is None else tokens.notes)),
        unused=unused, low_memory=low_memory,
    )  # fmt: skip


def _unused_scores(
    options: Options, cut: Sequence[str], *, scored: bool, measures: bool, tokens: bool, low_memory: bool
) -> str:
    """Return why scores that lie ready change nothing, or an empty string; refuse to run the source for nothing.

    One command line may then go through choices that read scores and choices that do not.
    """
    if low_memory and not scored:
        raise SizeError("low_memory: without calibration no model is run and nothing is fitted, so it changes nothing")
    if scored and not cut:
        but = " but that of the vocabulary" if tokens else ""
        raise SizeError(f"calibration chooses what is kept, and no size asked for is below the source's{but}")
    if not scored or reads_scores(options.preset, options.select, options.readers, options.layers, cut):
        return ""
    why = (
        f"preset '{options.preset}', select '{options.select}', readers '{options.readers}', layers '{options.layers}' "
        "choose and fit without it"
    )
    if measures:
        raise SizeError(f"calibration: {why}; leave it out, or ask for one that goes by activations")
    return f"the calibration is not used: {why}"


@dataclass(frozen=True)
class _Chosen:
    """What stays of the source, what fits the readers to it, and what the plan has to tell of the choice."""

    shrink: ShrinkPreset | None
    steps: tuple[LayerStep, ...]
    maps: dict[str, AxisMap]
    fit: Fit | None
    notes: list[str]
    inexact: list[str]


def _fits(asked: _Asked, scores: Scores | None) -> bool:
    return scores is not None and asked.shrink is not None and asked.shrink.readers in FITTED


def _chosen(asked: _Asked, scores: Scores | None, progress: Progress) -> _Chosen:
    """Return the layers, heads, neurons, experts and directions that stay."""
    tensors, config, target, options, shrink = asked.tensors, asked.config, asked.target, asked.options, asked.shrink
    notes = [*asked.notes, *([asked.unused] if asked.unused else [])]

    def search(found: Scores) -> Found:
        from anysize.calibration.evolution import searched  # noqa: PLC0415 - it runs the source

        return searched(tensors, target.sizes["layer"], found, options, progress, low_memory=asked.low_memory)

    steps, inexact = depth_plan(config, target, options, shrink, scores, search, notes)
    # Where only layers go, nothing is chosen; but what reads behind a gap may be fitted to what comes out of it.
    if shrink is None or not (asked.chosen or _fits(asked, scores)):
        return _Chosen(shrink, steps, asked.maps, None, notes, inexact)
    shrink, why = possible_directions(config, shrink, cut_hidden="hidden" in asked.cut)
    notes += why
    from anysize.select import Selector  # noqa: PLC0415 - it needs torch, which most plans do without

    select = Selector(config, tensors, asked.names, shrink.select, options.seed, scores)
    maps = selected(config, asked.maps, select, steps)
    if shrink.readers == "sequential" and scores is not None:
        speaks = asked.tokens is None or bool(asked.tokens.tokenizer_sha256)
        named = options.readers != "auto"
        shrink, why = sequential_if_possible(config, target, shrink, steps, maps, scores, asked=named, speaks=speaks)
        notes += why
    fit: Fit | None = None
    if scores is not None:
        notes += few_samples(scores, config, target.config, shrink)
    if scores is not None and "ffn" in asked.cut:
        notes += unfitted_experts(config, target, scores, shrink)
    if scores is not None and shrink.readers in FITTED:
        notes += unfitted_readers(config, target, shrink.readers)
        from anysize.fit import Fit  # noqa: PLC0415

        on_disk = asked.low_memory or not fits_in_memory(num_parameters(config) + num_parameters(target.config))
        fit = Fit(config, target.config, tensors, asked.names, scores, shrink, steps, maps, on_disk=on_disk)
    return _Chosen(shrink, steps, maps, fit, notes, [*inexact, *cut_reasons(config, target, shrink)])


def _weights_read(asked: _Asked, chosen: _Chosen, scores: Scores | None) -> str:
    """Return a hash of the source's weights where they, or scores of them, chose or fitted something, else ""."""
    if scores is not None and chosen.shrink is not None:
        # That of the source itself: scores of another model are refused.
        return scores.record.model_sha256
    if chosen.shrink is None or not asked.chosen or chosen.shrink.select != "weight":
        return ""
    from anysize.calibration.scores import model_sha256  # noqa: PLC0415 - it needs torch

    return model_sha256(asked.tensors)


def _target_config(asked: _Asked, steps: tuple[LayerStep, ...]) -> dict[str, Any]:
    """Return the config that is written: with lists cut to the layers, ids of kept tokens and the asked type."""
    raw = per_layer_lists(asked.config, asked.target.config, steps)
    # Remote code is never run and never copied, so the target must not ask for it.
    raw.pop("auto_map", None)
    if asked.tokens is not None:
        raw = target_ids(asked.config, raw, asked.tokens.axis)
    if asked.options.dtype != "keep":
        raw.pop("torch_dtype", None)
        raw["dtype"] = asked.options.dtype
    return raw


def _assembled(
    asked: _Asked, chosen: _Chosen, scores: Scores | None, target_raw: dict[str, Any], fitted: Fitted,
    stream_scale: float = 1.0,
) -> Plan:  # fmt: skip
    """Return the plan of what was chosen, with what was fitted to it."""
    config, steps, maps = asked.config, chosen.steps, chosen.maps
    made = Recipes(
        config,
        asked.target,
        asked.preset,
        asked.options,
        steps,
        maps,
        asked.names,
        asked.tensors,
        chosen.shrink,
        fitted,
    )
    recipes, target_raw, loud = scaled(made.all(), asked.target.config, target_raw, stream_scale)
    dropped = {**asked.dropped, **left_out(config, asked.names, steps, maps)}
    notes, reasons = (*chosen.notes, *loud, *_rounding(recipes)), (*chosen.inexact, *_inexact(config, asked.target))
    plan = _plan(made, recipes, dict(target_raw), dropped, notes, reasons)
    source = plan.source.model_copy(update={"weights_sha256": _weights_read(asked, chosen, scores)})
    return plan.model_copy(
        update={
            "source": source,
            "scores_sha256": "" if scores is None or chosen.shrink is None else scores.sha256,
            "tokenizer_sha256": "" if asked.tokens is None else asked.tokens.tokenizer_sha256,
        }
    )


def make_plan(
    tensors: TensorSource,
    request: Mapping[str, int],
    options: Options,
    scores_from: Callable[[], Scores] | None = None,
    progress: Progress = quiet,
    tokens: KeptTokens | None = None,
    *,
    measures: bool = True,
    low_memory: bool = False,
) -> Plan:
    """Return the plan that makes the requested sizes out of a source.

    `tensors` holds the config and the tensor headers; weights are read only where the choice of what to keep asks for
    them. `scores_from` gives what `calibrate` found, and is called once the sizes are known to be legal; `measures`
    says whether it runs the source for that, which is refused where nothing reads the scores. `tokens` says which
    tokens are kept, where some are cut. `low_memory` keeps on disk what can be kept there; where the models are large
    that is done anyway. Raises SizeError for an illegal size (with the nearest legal ones) or missing scores,
    ArchitectureError for a config that is not understood, CheckpointError for headers that do not fit it.
    """
    asked = _understood(
        tensors, request, options, tokens, scored=scores_from is not None, measures=measures, low_memory=low_memory
    )
    scores = None if scores_from is None else scores_from()
    if scores is not None:
        scores.require_model(tensors)
        # Whether they are of this model is looked at all the same: a command should not fail only when it uses them.
        scores = None if asked.unused else scores
        if scores is not None and asked.chosen and asked.shrink is not None:
            # Before a search of layers, which may take long.
            require_samples(scores, asked.config, asked.target.config, asked.shrink)
    chosen = _chosen(asked, scores, progress)
    # Refuses what no config can say, before a fit, which may take long as well.
    target_raw = _target_config(asked, chosen.steps)
    fitted = Fitted() if chosen.fit is None else chosen.fit.run()
    if chosen.fit is not None and chosen.shrink is not None and chosen.shrink.readers == "sequential":
        from anysize.sequential import refit  # noqa: PLC0415

        plan = _assembled(asked, chosen, scores, target_raw, fitted)
        fitted = refit(plan, tensors, chosen.fit, progress)
    # Only now: what is fitted follows the stream of the source, as large as that is.
    return _assembled(asked, chosen, scores, target_raw, fitted, options.stream_scale)
