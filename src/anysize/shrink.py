"""The shrink presets: how what is kept is chosen, and how readers make up for what was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from anysize.axis import AxisMap
from anysize.config import SourceConfig
from anysize.errors import SizeError
from anysize.layers import EVOLUTIONARY, SCORED, LayerStep
from anysize.recipe import Options
from anysize.tensors import expected_tensors


@dataclass(frozen=True)
class ShrinkPreset:
    """One way to shrink. select, readers: see `recipe.Options`; layers: how depth is cut."""

    name: str
    select: str
    readers: str
    layers: str


SHRINK_PRESETS = {
    preset.name: preset
    for preset in (
        # Weight subcloning (2312.09299): mean |activation|, sqrt(n/m) on cut fan-ins.
        ShrinkPreset("subcloning", "activation", "fan-in", "middle"),
        # Weight selection (2311.18823): uniform stride, no data.
        ShrinkPreset("weight-selection", "stride", "none", "first"),
        # Minitron (2407.14679): scores of norm outputs, heads and neurons.
        ShrinkPreset("minitron", "minitron", "none", "block-influence"),
        # Principal directions of the residual stream, readers fitted layer by layer to what the target produces.
        ShrinkPreset("subspace", "principal", "sequential", "block-influence"),
    )
}
_WITH_DATA, _WITHOUT_DATA = "subspace", "weight-selection"
CHOSEN_PER_LAYER = ("expert", "ffn", "kv", "group")
FITTED = ("measured", "least-squares", "sequential")
# Under these, heads and neurons go by what removing them costs, once what reads the rest is fitted again.
BY_REMOVAL = ("refit", "principal")
FROM_DATA = ("activation", "rms", "minitron", "refit", "principal")


def shrink_preset(options: Options, *, has_scores: bool, chooses: bool = True) -> ShrinkPreset:
    """Return the preset that the options name, or the default, with --select and --readers on top of it.

    chooses: whether anything is cut inside of layers.
    """
    default = _WITH_DATA if has_scores else _WITHOUT_DATA
    preset = SHRINK_PRESETS[options.preset if options.preset in SHRINK_PRESETS else default]
    if options.select != "auto":
        preset = replace(preset, select=options.select)
    if options.readers != "auto":
        preset = replace(preset, readers=options.readers)
    if preset.readers in FITTED and not has_scores:
        raise SizeError(
            f"readers '{preset.readers}' are fitted to activations: pass --calibration with data or a scores file"
        )
    if chooses and preset.select == "principal" and preset.readers not in ("least-squares", "sequential"):
        raise SizeError(
            f"principal directions are no selection, so their readers have to be least-squares or sequential, "
            f"not '{preset.readers}'"
        )
    return preset


def reads_scores(preset: str, select: str, readers: str, layers: str, cut: Sequence[str]) -> bool:
    """Whether a plan with these options (see `recipe.Options`) is chosen or fitted by what calibration found.

    cut: the axes that get smaller, without `vocab`.
    """
    default = SHRINK_PRESETS[preset if preset in SHRINK_PRESETS else _WITH_DATA]
    select, readers, layers = (
        own if asked == "auto" else asked
        for asked, own in ((select, default.select), (readers, default.readers), (layers, default.layers))
    )
    chosen = any(axis != "layer" for axis in cut) and select in FROM_DATA
    return chosen or readers in FITTED or ("layer" in cut and layers in (*SCORED, EVOLUTIONARY))


def why_stream_is_bound(config: SourceConfig) -> str:
    """Return why the residual stream can be neither turned nor multiplied, or an empty string."""
    architecture = config.architecture
    for norm in architecture.norms.values():
        if not config.holds(norm.when):
            continue
        if norm.writes == "hidden":
            return "a norm ends each branch, and has its gain and eps there"
        if norm.writes == "norm(hidden)" and config.holds(norm.after_sum):
            return "a norm stands on the residual stream itself"
    for expected in expected_tensors(config).values():
        if any(str(dim) == "hidden" for dim in expected.arrow.reads):
            return f"{expected.name} reads the stream without a norm before it"
    final = architecture.norms.get(architecture.final_norm)
    if config.tied and (final is None or not config.holds(final.stored)):
        return "the head is tied and there is no final gain to make up for it"
    return ""


def why_not_sequential(
    config: SourceConfig, steps: Sequence[LayerStep], axes: Mapping[str, AxisMap], *, fits_in_memory: bool
) -> str:
    """Return why readers cannot be fitted layer by layer to what the target produces, or an empty string."""
    sources = [step.source for step in steps]
    if any(m.target_size > m.source_size for m in axes.values()):
        return "an axis grows"
    if sources != sorted(set(sources)) or any(step.silent for step in steps):
        return "layers are repeated or out of order"
    if "expert" in axes:
        return "each expert reads only the tokens that are routed to it"
    if not fits_in_memory:
        return "a layer of each model and the activations do not fit into half of the free memory"
    return why_stream_is_bound(config)
