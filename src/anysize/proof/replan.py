"""Hold a plan against what this version plans for the same source, sizes and options: nothing in it was edited.

A plan that agrees with itself can still be wrong, and models too large to be compared would not show it. What was
chosen from data (which coordinates are kept, what was fitted) is taken from the plan and checked for being a choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anysize import target as targets
from anysize.arch.schema import Norm, Parameter
from anysize.axis import AxisMap
from anysize.config import understand
from anysize.errors import AnysizeError, ProofError, joined
from anysize.io.reader import TensorSource
from anysize.planner import make_plan, recipes_with_maps
from anysize.recipe import Plan, Recipe
from anysize.shrink import FITTED, SHRINK_PRESETS
from anysize.tensors import expected_tensors
from anysize.vocabulary.keep import kept_again

_SHOWN = 3
_DENSE = ("reader", "writer", "value")


def _differs(what: str, got: object, wanted: object) -> str:
    return f"{what} is {got!r:.80}, planned {wanted!r:.80}"


def _measures_factor(plan: Plan, recipe: Recipe, origin: Parameter | Norm) -> bool:
    """Whether the factor of a tensor comes from data: a reader's, or that of a gain whose norm spans what was cut."""
    if isinstance(origin, Norm):
        return plan.options.readers in FITTED and not recipe.value
    return plan.options.readers == "measured"


def _recipe_differences(got: Recipe, wanted: Recipe, *, fitted: bool, measured: bool) -> Iterator[str]:
    for name in Recipe.model_fields:
        if fitted and ((name in _DENSE and (got.reader or got.writer or got.value)) or (name == "factor" and measured)):
            continue
        one, other = getattr(got, name), getattr(wanted, name)
        if one != other:
            yield _differs(f"{name} of {got.name}", one, other)


def _choice_differences(axis: str, got: AxisMap, wanted: AxisMap) -> Iterator[str]:
    cut = wanted.target_size < wanted.source_size
    if not cut and got != wanted:
        yield _differs(f"the map of {axis}", got.runs, wanted.runs)
    elif (got.source_size, got.target_size) != (wanted.source_size, wanted.target_size):
        yield _differs(f"the size of {axis}", got.target_size, wanted.target_size)
    elif cut and (got.num_new or int(got.multiplicity.max()) > 1):
        yield f"the map of {axis} is no choice: it repeats coordinates or adds new ones"


def _setting_differences(got: dict[str, Any], wanted: dict[str, Any]) -> Iterator[str]:
    for key in sorted(got.keys() | wanted.keys()):
        if got.get(key) != wanted.get(key):
            yield _differs(f"target_config.{key}", got.get(key), wanted.get(key))


def differences(plan: Plan, tensors: TensorSource) -> list[str]:
    """Return how a plan departs from what this version makes of its source, sizes and options; empty if it does not."""
    config, target = understand(tensors.config), understand(plan.target_config)
    request = targets.like(config, target)
    options = plan.options
    drops_layers = target.sizes["layer"] < config.sizes["layer"]
    if drops_layers:
        # Which layers stay may have been chosen by scores, which a plan does not hold.
        options = options.with_layers(",".join(str(step.source) for step in plan.layers))
    cut = any(axis not in ("layer", "vocab") and target.sizes[axis] < size for axis, size in config.sizes.items())
    if not cut:
        # Where only tokens are cut, a preset has nothing to do; where only layers are, one that cuts chooses nothing.
        resized = any(axis != "vocab" and target.sizes[axis] != size for axis, size in config.sizes.items())
        named = plan.options.preset not in SHRINK_PRESETS and (resized or plan.kept_tokens is None)
        preset = plan.options.preset if named else "auto"
        options = options.model_copy(update={"select": "auto", "readers": "auto", "preset": preset})
    else:
        options = options.model_copy(update={"select": "first", "readers": "none"})
    try:
        tokens = None if plan.kept_tokens is None else kept_again(tensors, config, plan.kept_tokens)
        wanted = make_plan(tensors, request, options, tokens=tokens)
        recipes, dropped = recipes_with_maps(plan, tensors) if cut else (wanted.recipes, wanted.dropped)
    except AnysizeError as refusal:
        return [f"it is refused: {refusal}"]
    found = list(_setting_differences(plan.target_config, wanted.target_config))
    for axis, axis_map in plan.axes.items():
        base = axis.partition(".")[0]
        if base not in wanted.axes:
            found.append(f"the model has no axis {base}")
        else:
            found += _choice_differences(axis, axis_map, wanted.axes[base])
    if plan.layers != wanted.layers:
        found.append(_differs("the layer plan", [s.source for s in plan.layers], [s.source for s in wanted.layers]))
    if plan.tokenizer_sha256 != wanted.tokenizer_sha256:
        found.append(_differs("the tokenizer", plan.tokenizer_sha256, wanted.tokenizer_sha256))
    if plan.dropped != dropped:
        found.append(_differs("what is dropped", sorted(plan.dropped), sorted(dropped)))
    if len(plan.recipes) != len(recipes):
        found.append(_differs("the number of tensors", len(plan.recipes), len(recipes)))
    # What reads behind a gap may be fitted though nothing is cut inside of the layers.
    fitted = cut or (drops_layers and plan.options.readers == "sequential")
    expected = expected_tensors(target)
    for got, planned in zip(plan.recipes, recipes, strict=False):
        measured = got.name in expected and _measures_factor(plan, got, expected[got.name].origin)
        found += _recipe_differences(got, planned, fitted=fitted, measured=measured)
    return found


def require_unedited(plan: Plan, tensors: TensorSource) -> None:
    """Raise ProofError where a plan is not what this version plans, naming the first differences."""
    found = differences(plan, tensors)
    if found:
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        shown = joined(found[:_SHOWN])
        raise ProofError(
            f"the plan is not what this version makes of its source and options: {shown}{more}; plan again"
        )
