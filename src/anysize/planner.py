"""Make a plan: config and tensor headers in, one recipe for every target tensor out. No weights are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, cast

from anysize import __version__
from anysize.arch.schema import Norm, Parameter, is_per_layer
from anysize.axis import AxisMap, own_place
from anysize.config import SourceConfig, understand
from anysize.cutting import (
    cut_reasons,
    left_out,
    possible_directions,
    require_used,
    selected,
    sequential_if_possible,
    unfitted_experts,
)
from anysize.dense import DenseMaps, Fitted
from anysize.depth import depth_plan, per_layer_lists, require_pattern
from anysize.dims import compose
from anysize.errors import SizeError
from anysize.io.reader import TensorSource
from anysize.layers import LayerStep, layer_plan
from anysize.memory import fits_in_memory
from anysize.notation import Dim
from anysize.presets import FRESH_SCALE, Preset, axis_maps, has_layer_norm, preset_named
from anysize.proof.coverage import account, check_source
from anysize.recipe import BYTES, Dtype, Options, Pad, Plan, Recipe, Share, Source
from anysize.shrink import (
    FITTED,
    ShrinkPreset,
    reads_scores,
    shrink_preset,
)
from anysize.target import Target, resolve_or_suggest
from anysize.tensors import Expected, expected_tensors, made_from, num_parameters, shape_of
from anysize.vocabulary.ids import target_ids

if TYPE_CHECKING:
    from anysize.calibration.evolution import Found
    from anysize.calibration.scores import Scores
    from anysize.fit import Fit
    from anysize.vocabulary.keep import KeptTokens

DTYPES: dict[str, Dtype | None] = {"keep": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass
class _Planner:
    """The state of one planning run: source and target configs, maps, and the scale of each stream."""

    config: SourceConfig
    target: Target
    preset: Preset
    options: Options
    steps: tuple[LayerStep, ...]
    axes: dict[str, AxisMap]
    names: Mapping[str, str]
    tensors: TensorSource
    shrink: ShrinkPreset | None = None
    fitted: Fitted = field(default_factory=Fitted)

    def __post_init__(self) -> None:
        self._repeating: dict[Dim, bool] = {}
        self._target_sizes = {axis: m.target_size for axis, m in self.axes.items() if "." not in axis}
        hidden = self.axes["hidden"]
        # Where coordinates are cut, what is kept is kept as it is, and there is one copy of it.
        cut = hidden.target_size < hidden.source_size
        copies = 1 if cut else int(hidden.multiplicity[0])
        ratio = 1.0 if cut else copies * hidden.source_size / hidden.target_size
        # The residual stream holds c copies-and-pad, c = 1/sqrt(r): its mean square, and with it eps, is unchanged.
        self.copies = copies
        self.stream = ratio**-0.5
        # Asked for at once: a tied head without a gain to fold into is refused even where nothing else would ask.
        _ = self.final_scale
        self.pad: Pad = "mean" if has_layer_norm(self.config) else "zero"

    @property
    def embedding_scale(self) -> float:
        """Run-time multipliers sqrt(hidden) grow with the target and are taken out of the stored embedding."""
        return self.stream * (self.axes["hidden"].source_size / self.axes["hidden"].target_size) ** 0.5

    @property
    def tied_embedding(self) -> Parameter | None:
        """The embedding that is also the head, where it reads the resized stream; None where nothing has to fold."""
        if not self.target.config.tied or self.axes["hidden"].is_identity:
            return None
        name = next(iter(self.config.architecture.tied.values()))
        for expected in expected_tensors(self.config).values():
            if expected.name == name and isinstance(expected.origin, Parameter) and "hidden" in expected.arrow.axes:
                return expected.origin
        return None

    @cached_property
    def branch_scale(self) -> float:
        """The scale of norm(hidden) inside the layers: 1 where a gain takes c out, c where none is stored."""
        opening = [
            self.config.holds(norm.stored)
            for pattern, norm in self.config.architecture.norms.items()
            if norm.writes == "norm(hidden)" and is_per_layer(pattern) and self.config.holds(norm.when)
        ]
        return 1.0 if all(opening) else self.stream

    @cached_property
    def final_scale(self) -> float:
        """The scale of norm(hidden) before the head; where the head is tied, the gain takes the read share as well."""
        norm = self.config.architecture.norms.get(self.config.architecture.final_norm)
        stored = norm is not None and self.config.holds(norm.when) and self.config.holds(norm.stored)
        embedding = self.tied_embedding
        if embedding is None:
            return 1.0 if stored else self.stream
        scale = (self.embedding_scale if embedding.times else self.stream) * self.copies
        if stored:
            # A tied matrix is written at factor 1, so the gain also takes what the head's cut fan-in asks for.
            return self._fan_in("hidden") / scale
        if scale != 1:
            raise SizeError(
                "the head is tied to the embedding and there is no final norm gain to take the read share; "
                "untie it (--untie) or keep hidden_size"
            )
        return self.stream

    def _fan_in(self, *axes: str) -> float:
        """Return sqrt(n / m) over the cut axes among these, where the preset scales cut fan-ins (2312.09299)."""
        if self.shrink is None or self.shrink.readers != "fan-in":
            return 1.0
        # An embedding looks one row up: however many tokens there are, its fan-in is one.
        maps = [self.axes[axis] for axis in axes if axis in self.axes and axis != "vocab"]
        return prod((m.source_size / m.target_size) ** 0.5 for m in maps if m.target_size < m.source_size)

    def source_name(self, expected: Expected) -> str:
        wanted = made_from(expected, self.steps, self.axes)
        if wanted not in self.names and self.options.untie:
            wanted = self.config.architecture.tied.get(wanted, wanted)
        return self.names[wanted]

    def norm_recipe(self, expected: Expected, norm: Norm) -> dict[str, Any]:
        """Return the recipe fields of a gain or bias: gains map stream scales, pads are 1, biases write."""
        if "hidden" not in norm.reads:
            return {"pad": "one"} if expected.part == "weight" else {}
        if norm.writes.startswith("norm"):
            final = expected.name.rpartition(".")[0] == self.config.architecture.final_norm
            out = self.final_scale if final else self.branch_scale
        else:
            out = self.stream
        if expected.part == "weight":
            return {"factor": out / self.stream, "stored_as": norm.gain, "pad": "one"}
        return {"factor": out, "pad": "zero"}

    def _read_scale(self, expected: Expected) -> float:
        """Return what a reader divides by: the scale of the stream it reads."""
        factors = [f for dim in expected.arrow.reads for block in dim.blocks for f in block.factors]
        if not any(f.axis == "hidden" for f in factors):
            return 1.0
        if not any(f.role == "norm" for f in factors):
            return self.stream
        return self.branch_scale if is_per_layer(expected.pattern) else self.final_scale

    def parameter_recipe(self, expected: Expected, parameter: Parameter) -> dict[str, Any]:
        """Return the recipe fields of a weight or bias: writers of `hidden` carry c, readers divide it out."""
        arrow = expected.arrow
        factor = 1.0
        if any("hidden" in dim.axes for dim in arrow.writes):
            factor *= self.embedding_scale if parameter.times else self.stream
        factor *= self._fan_in(*(axis for dim in arrow.reads for axis in dim.axes)) / self._read_scale(expected)
        fields: dict[str, Any] = {"factor": factor, "pad": self.pad, "fresh_scale": FRESH_SCALE,
                                  "fresh_std": self.config.init_std}  # fmt: skip
        share: Share = self.preset.share if any(self._repeats(dim) for dim in arrow.reads) else "none"
        fields["share"] = share
        if self.preset.noisy and share != "none":
            fields["noise_db"] = self.options.noise_db
        if self.config.holds(self.config.architecture.fixed_score_scale):
            fields["score_power"] = 0.0
        return fields

    def _repeats(self, dim: Dim) -> bool:
        """Whether what is read holds several copies of something, so that readers have to share it out."""
        if dim not in self._repeating:
            groups = compose(dim, self.axes, writes=False).groups
            self._repeating[dim] = any(group.num_copies > 1 for group in groups)
        return self._repeating[dim]

    def ends_branch(self, expected: Expected) -> bool:
        """Whether zeroing this tensor silences a residual branch: a branch norm's gain, else a writer of hidden."""
        norms = self.config.architecture.norms
        branch_norms = any(
            n.writes == "hidden" and is_per_layer(p) and self.config.holds(n.when) for p, n in norms.items()
        )
        if isinstance(expected.origin, Norm):
            return expected.origin.writes == "hidden"
        return not branch_norms and any("hidden" in dim.axes for dim in expected.arrow.writes)

    @property
    def resolved_options(self) -> Options:
        """The options with every "auto" replaced by what it meant."""
        if self.shrink is None:
            return self.options.model_copy(update={"preset": self.preset.name})
        named = self.options.preset != "auto"
        return self.options.model_copy(
            update={
                "preset": self.options.preset if named else self.shrink.name,
                "select": self.shrink.select,
                "readers": self.shrink.readers,
            }
        )

    def recipe(self, expected: Expected) -> Recipe:
        step = None if expected.layer is None else self.steps[expected.layer]
        source = self.source_name(expected)
        layer, expert = own_place(self.axes, expected.arrow.axes, expected.layer, expected.expert)
        info = self.tensors.tensors[source]
        stored = cast("Dtype", info.dtype)  # `check_source` has refused every other type
        fields = (
            self.norm_recipe(expected, expected.origin)
            if isinstance(expected.origin, Norm)
            else self.parameter_recipe(expected, expected.origin)
        )
        return Recipe(
            name=expected.name,
            source=source,
            arrow=str(expected.arrow),
            source_shape=info.shape,
            shape=shape_of(expected.arrow, self._target_sizes),
            source_dtype=stored,
            dtype=DTYPES[self.options.dtype] or stored,
            silent=bool(step and step.silent and self.ends_branch(expected)),
            layer=layer,
            expert=expert,
            **{**fields, **self.fitted.fields.get(expected.name, {})},
        )


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
    planner = _Planner(config, target, preset_named(options.preset), options, steps, maps, names, tensors)
    recipes = tuple(planner.recipe(expected) for expected in expected_tensors(target.config).values())
    dropped |= left_out(config, names, steps, maps)
    return _plan(planner, recipes, dict(target.config.raw), dropped, (), ())


def recipes_with_maps(plan: Plan, tensors: TensorSource) -> tuple[tuple[Recipe, ...], dict[str, str]]:
    """Return the recipes, and what is dropped, that a plan's own maps and fitted tensors stand for."""
    config, target = understand(tensors.config), understand(plan.target_config)
    names, dropped = check_source(config, tensors)
    fields = ("reader", "writer", "value", "factor")
    fitted = Fitted(
        fields={
            recipe.name: {name: getattr(recipe, name) for name in fields}
            for recipe in plan.recipes
            if recipe.reader or recipe.writer or recipe.value
        }
    )
    planner = _Planner(
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
    recipes = tuple(planner.recipe(expected) for expected in expected_tensors(target).values())
    return recipes, dropped | left_out(config, names, plan.layers, plan.axes)


def _plan(
    planner: _Planner,
    recipes: tuple[Recipe, ...],
    target_raw: dict[str, Any],
    dropped: dict[str, str],
    notes: tuple[str, ...],
    inexact: tuple[str, ...],
) -> Plan:
    tensors, config = planner.tensors, planner.config
    plan = Plan(
        anysize_version=__version__,
        source=Source(
            location=tensors.location, config_sha256=tensors.config_sha256, headers_sha256=tensors.headers_sha256
        ),
        model_type=config.architecture.model_type,
        model_class=config.model_class,
        options=planner.resolved_options,
        source_config=dict(config.raw),
        target_config=target_raw,
        axes=planner.axes,
        layers=planner.steps,
        recipes=recipes,
        dropped=dropped,
        notes=notes,
        inexact=inexact,
        dense_sha256=(dense := DenseMaps(planner.fitted.dense)).sha256,
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


def _untied(config: SourceConfig, target: Target) -> Target:
    if not config.tied:
        raise SizeError("untie: the head of this model is not tied to its embedding")
    changes = {config.architecture.tied_when: False}
    raw, full = ({**values, **changes} for values in (target.config.raw, target.config.full))
    return Target(target.sizes, SourceConfig(config.architecture, raw, full, config.model_class))


def make_plan(
    tensors: TensorSource,
    request: Mapping[str, int],
    options: Options,
    scores_from: Callable[[], Scores] | None = None,
    progress: Callable[[str, int, int], None] = lambda _stage, _done, _total: None,
    tokens: KeptTokens | None = None,
    *,
    low_memory: bool = False,
) -> Plan:
    """Return the plan that makes the requested sizes out of a source.

    `tensors` holds the config and the tensor headers; weights are read only where the choice of what to keep asks for
    them. `scores_from` gives what `calibrate` found, and is called once the sizes are known to be legal; `tokens` says
    which tokens are kept, where some are cut. `low_memory` keeps on disk what can be kept there; where the models are
    large that is done anyway. Raises SizeError for an illegal size (with the nearest legal ones) or
    missing scores, ArchitectureError for a config that is not understood, CheckpointError for headers that do not fit
    it.
    """
    config = understand(tensors.config)
    preset = preset_named(options.preset)
    if options.noise_db != Options().noise_db and not preset.noisy:
        raise SizeError(f"noise_db={options.noise_db:g}: the preset '{preset.name}' adds no noise, a noisy one does")
    names, dropped = check_source(config, tensors)
    target = resolve_or_suggest(config, request, legality(config, options, tokens))
    if options.untie:
        target = _untied(config, target)
    # Tokens are cut by name; everything else by what the source does.
    cut = [a for a, size in target.sizes.items() if a != "vocab" and size < config.sizes[a]]
    grows = any(size > config.sizes[a] for a, size in target.sizes.items())
    depth = target.sizes["layer"] - config.sizes["layer"]
    require_used(options, grows=grows, cut=cut, depth=depth, tokens=tokens is not None)
    if scores_from is not None and not cut:
        but = "" if tokens is None else " but that of the vocabulary"
        raise SizeError(f"calibration chooses what is kept, and no size asked for is below the source's{but}")
    if scores_from is not None and not reads_scores(
        options.preset, options.select, options.readers, options.layers, cut
    ):
        raise SizeError(
            f"calibration: preset '{options.preset}', select '{options.select}', readers '{options.readers}', layers "
            f"'{options.layers}' choose and fit without it; leave it out, or ask for one that goes by activations"
        )
    if low_memory and scores_from is None:
        raise SizeError("low_memory: without calibration no model is run and nothing is fitted, so it changes nothing")
    maps, notes = axis_maps(config, target.sizes, preset, None if tokens is None else tokens.axis)
    notes += () if tokens is None else tokens.notes
    chooses = cut != ["layer"]
    shrink = shrink_preset(options, has_scores=scores_from is not None, chooses=chooses) if cut else None
    require_pattern(config, target, options.layers)
    scores = None if scores_from is None else scores_from()
    if scores is not None:
        scores.require_model(tensors)
        if chooses and shrink is not None and shrink.readers in FITTED:
            from anysize.fit import require_samples  # noqa: PLC0415

            # Before a search of layers, which may take long.
            require_samples(scores, config, target.config)

    def search(found: Scores) -> Found:
        from anysize.calibration.evolution import searched  # noqa: PLC0415 - it runs the source

        return searched(tensors, target.sizes["layer"], found, options, progress, low_memory=low_memory)

    steps, inexact = depth_plan(config, target, options, shrink, scores, search, notes)
    fit: Fit | None = None
    # Where only layers go, nothing is chosen; but what reads behind a gap may be fitted to what comes out of it.
    if shrink is not None and (chooses or (scores is not None and shrink.readers in FITTED)):
        shrink, why = possible_directions(config, shrink, cut_hidden="hidden" in cut)
        notes += why
        from anysize.select import Selector  # noqa: PLC0415 - it needs torch, which most plans do without

        maps = selected(config, maps, Selector(config, tensors, names, shrink.select, options.seed, scores), steps)
        if shrink.readers == "sequential":
            speaks = tokens is None or bool(tokens.tokenizer_sha256)
            asked = options.readers != "auto"
            shrink, why = sequential_if_possible(config, target, shrink, steps, maps, asked=asked, speaks=speaks)
            notes += why
        if scores is not None and "ffn" in cut:
            notes += unfitted_experts(config, target, scores, shrink.readers)
        if scores is not None and shrink.readers in FITTED:
            from anysize.fit import Fit  # noqa: PLC0415

            on_disk = low_memory or not fits_in_memory(num_parameters(config) + num_parameters(target.config))
            fit = Fit(config, target.config, tensors, names, scores, shrink, steps, maps, on_disk=on_disk)
        inexact += cut_reasons(config, target, shrink)
    target_raw = per_layer_lists(config, target.config, steps)
    # Remote code is never run and never copied, so the target must not ask for it.
    target_raw.pop("auto_map", None)
    dropped |= left_out(config, names, steps, maps)
    if tokens is not None:
        target_raw = target_ids(config, target_raw, tokens.axis)

    def assembled(fitted: Fitted) -> Plan:
        planner = _Planner(config, target, preset, options, steps, maps, names, tensors, shrink, fitted)
        recipes = tuple(planner.recipe(expected) for expected in expected_tensors(target.config).values())
        stored = dict(target_raw)
        if options.dtype != "keep":
            stored.pop("torch_dtype", None)
            stored["dtype"] = options.dtype
        reasons = (*inexact, *_inexact(config, target))
        plan = _plan(planner, recipes, stored, dropped, (*notes, *_rounding(recipes)), reasons)
        return plan.model_copy(
            update={
                "scores_sha256": "" if scores is None or shrink is None else scores.sha256,
                "tokenizer_sha256": "" if tokens is None else tokens.tokenizer_sha256,
            }
        )

    plan = assembled(Fitted() if fit is None else fit.run())
    if fit is None or shrink is None or shrink.readers != "sequential":
        return plan
    from anysize.sequential import refit  # noqa: PLC0415

    return assembled(refit(plan, tensors, fit, progress))
