"""A louder or quieter residual stream that computes the same: an optimizer moves what writes it less or more.

Under RMSNorm and LayerNorm only the direction of the stream counts, so everything that writes it may be multiplied by
s, with eps by s^2. A head that is tied to the embedding is multiplied with it, and the final gain divided. Where
queries and keys have norms, those share eps, and what they read is multiplied as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anysize.arch.schema import Norm
from anysize.config import SourceConfig, default_of
from anysize.errors import SizeError
from anysize.recipe import Recipe
from anysize.shrink import why_stream_is_bound
from anysize.tensors import Expected, expected_tensors

# Gains that are stored less one come close to -1 where they are divided, and half precision is coarse there.
_MOST_OF_A_GAIN = 4.0


def require_stream_scale(config: SourceConfig, scale: float) -> None:
    """Raise SizeError with the reason where the stream of a model cannot be `scale` times as large."""
    if scale == 1:
        return
    why = why_stream_is_bound(config) if config.architecture.stream_eps else "no config key holds the eps of its norms"
    if not why:
        eps = _eps(config)
        if not isinstance(eps, float | int) or isinstance(eps, bool) or not 0 <= eps < 1:
            why = f"its {config.architecture.stream_eps} is {eps!r}, wanted a number from 0 to 1"
    if why:
        raise SizeError(f"stream_scale={scale:g}: {config.architecture.model_type} cannot have it, because {why}")
    final = config.architecture.norms[config.architecture.final_norm]
    if scale > _MOST_OF_A_GAIN and config.tied and final.gain == "1+w":
        raise SizeError(
            f"stream_scale={scale:g}: the head is tied and the final gain, which is stored less one, would be divided "
            f"by more than {_MOST_OF_A_GAIN:g}, too coarse for half precision: use a smaller one, or --untie"
        )


def _eps(config: SourceConfig) -> Any:
    key = config.architecture.stream_eps
    return config.full[key] if key in config.full else default_of(config.architecture, key)


def _has_head_norms(config: SourceConfig) -> bool:
    return any("hidden" not in norm.reads and config.holds(norm.when) for norm in config.architecture.norms.values())


def _factor(config: SourceConfig, expected: Expected, scale: float) -> float:
    """Return what one tensor of a model is multiplied by, so that its stream is `scale` times as large."""
    if isinstance(expected.origin, Norm):
        final = expected.name.rpartition(".")[0] == config.architecture.final_norm
        return 1 / scale if final and config.tied else 1.0
    factors = [f for dim in expected.arrow.writes for block in dim.blocks for f in block.factors]
    if any(f.axis == "hidden" for f in factors):
        return scale
    if not _has_head_norms(config) or not any(f.role in ("query", "key") for f in factors):
        return 1.0
    assert all(len(dim.blocks) == 1 for dim in expected.arrow.writes), "values would be multiplied as well"
    return scale


def scaled(
    recipes: Sequence[Recipe], config: SourceConfig, raw: dict[str, Any], scale: float
) -> tuple[tuple[Recipe, ...], dict[str, Any], tuple[str, ...]]:
    """Return the recipes and the raw config of a target whose stream is `scale` times as large, and notes on it.

    config: of the target, which `require_stream_scale` has let pass.
    """
    if scale == 1:
        return tuple(recipes), raw, ()
    expected = expected_tensors(config)

    def changed(recipe: Recipe) -> Recipe:
        factor = _factor(config, expected[recipe.name], scale)
        # New coordinates speak to a tied head as loudly as the others.
        gains = {"new_gain": recipe.new_gain * factor} if recipe.pad == "one" else {}
        return recipe.model_copy(update={"factor": recipe.factor * factor, **gains})

    made = tuple(changed(recipe) for recipe in recipes)
    key, eps = config.architecture.stream_eps, _eps(config)
    note = f"the residual stream is {scale:g} times as large, with {key} {eps:g} -> {eps * scale**2:g}"
    notes = [note]
    if scale > 1 and any(recipe.dtype == "F16" for recipe in made):
        notes.append(
            "float16 ends at 65,504, and what goes along the stream is larger now: look for infinities, or use bfloat16"
        )
    return made, raw | {key: eps * scale**2}, tuple(notes)
