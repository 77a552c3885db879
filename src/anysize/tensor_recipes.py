"""One recipe for every tensor of a target: which maps it takes, and the scale of the stream that it reads or writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, cast

from anysize.arch.schema import Norm, Parameter, is_per_layer
from anysize.axis import AxisMap, own_place
from anysize.config import SourceConfig
from anysize.dense import Fitted
from anysize.dims import compose
from anysize.errors import SizeError
from anysize.io.reader import TensorSource
from anysize.layers import LayerStep
from anysize.notation import Dim
from anysize.presets import FRESH_SCALE, Preset, has_layer_norm
from anysize.recipe import Dtype, Options, Pad, Recipe, Share
from anysize.shrink import ShrinkPreset
from anysize.target import Target
from anysize.tensors import Expected, expected_tensors, shape_of, stored_source

DTYPES: dict[str, Dtype | None] = {"keep": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass
class Recipes:
    """What the recipes of one target share: source and target configs, maps, and the scale of each stream."""

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
        return stored_source(expected, self.steps, self.axes, self.names, self.config)

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

    def all(self) -> tuple[Recipe, ...]:
        """Return a recipe for every tensor of the target."""
        return tuple(self.recipe(expected) for expected in expected_tensors(self.target.config).values())

    def recipe(self, expected: Expected) -> Recipe:
        """Return the recipe of one tensor of the target."""
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
