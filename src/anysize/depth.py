"""How a plan changes depth: which layers of the source the target runs, and what its config says of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anysize.config import SourceConfig, per_layer_values
from anysize.errors import ArchitectureError, SizeError
from anysize.layers import EVOLUTIONARY, SCORED, LayerStep, layer_plan
from anysize.presets import has_norm_after_sum
from anysize.recipe import Options
from anysize.shrink import ShrinkPreset
from anysize.target import Target

if TYPE_CHECKING:
    from anysize.calibration.evolution import Found
    from anysize.calibration.scores import Scores


def _require_free_depth(config: SourceConfig, wanted: int) -> None:
    for condition, reason in config.architecture.depth_locked.items():
        if config.holds(condition):
            raise SizeError(f"num_hidden_layers {config.sizes['layer']} -> {wanted}: {reason}")


def require_pattern(config: SourceConfig, target: Target, pattern: str) -> None:
    """Refuse layers that the sizes alone make impossible, before anything is measured for them."""
    source, wanted = config.sizes["layer"], target.sizes["layer"]
    measured = pattern in (*SCORED, EVOLUTIONARY)
    if pattern != "auto" and not (measured and wanted < source):
        layer_plan(source, wanted, pattern)


def depth_plan(
    config: SourceConfig,
    target: Target,
    options: Options,
    shrink: ShrinkPreset | None,
    scores: Scores | None,
    search: Callable[[Scores], Found],
    notes: list[str],
) -> tuple[tuple[LayerStep, ...], list[str]]:
    """Return the layer plan and why it is not exact; what a search found goes into the notes.

    Raises SizeError where the family or the options allow no such depth.
    """
    source, wanted = config.sizes["layer"], target.sizes["layer"]
    pattern = options.layers
    if pattern == "auto":
        pattern = shrink.layers if shrink is not None and wanted < source else "identity"
    kinds = None if scores is None else {kind: values.tolist() for kind, values in scores.blocks.items()}
    chosen = pattern
    if pattern == EVOLUTIONARY and scores is not None:
        _require_free_depth(config, wanted)
        found = search(scores)
        chosen = found.listed
        notes.append(found.note)
    steps = layer_plan(source, wanted, chosen, kinds)
    if [s.source for s in steps] == list(range(source)):
        return steps, []
    _require_free_depth(config, wanted)
    silent = [s for s in steps if s.silent]
    if silent and has_norm_after_sum(config):
        raise SizeError(
            f"num_hidden_layers {source} -> {wanted}: with the norm after the residual sum no layer can be an "
            "identity; use --layers interpose or stack, which are not exact"
        )
    kept = [s.source for s in steps if not s.silent]
    if kept == list(range(source)):
        return steps, []
    return steps, [f"layers {pattern}: the target runs layers {','.join(map(str, kept))} of the source"]


def per_layer_lists(config: SourceConfig, target: SourceConfig, steps: tuple[LayerStep, ...]) -> dict[str, Any]:
    """Return the target's config with what it says layer by layer; raise ArchitectureError where that is too short."""
    changes: dict[str, Any] = {}
    for key in config.architecture.per_layer:
        kept = [step.source for step in steps] == list(range(config.sizes["layer"]))
        if kept and config.raw.get(key) is None:
            continue
        values = per_layer_values(config, key)
        if values is None:
            continue
        if len(values) != config.sizes["layer"]:
            raise ArchitectureError(f"{key} lists {len(values)} layers, the config has {config.sizes['layer']}")
        changes[key] = [values[step.source] for step in steps]
    return {**target.raw, **changes}
