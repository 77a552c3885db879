"""The state of AdamW: kept in a folder of a trained model, and carried through the maps of a plan that grows it.

A target that computes what its source does has gradients that follow from the source's. An element of the source with
value w stands in the target as a_1 w, a_2 w, ... (copies, shares, scales); every one of them has the gradient g / A,
A = a_1 + a_2 + ..., as dL/dw = sum a_i dL/dw_i says where these gradients are alike: copies with equal shares and fresh
capacity are exact under an RMSNorm, copies with unequal shares get the mean of theirs, and what the mean-holding pad of
a LayerNorm adds to the gradients of its writers is left out. So Adam's first moment is divided by A and its second by
A^2 (Ma et al. 2026, 2602.10545, have this for whole copies). What a plan adds has no past: both moments are zero there,
which is the asymmetric reset of Yu et al. (2026, 2602.02472).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from anysize.config import SourceConfig, understand
from anysize.dims import DimMap, Fill
from anysize.errors import InputError
from anysize.executor import DimMaps, as_matrix
from anysize.notation import parse
from anysize.recipe import Plan, Recipe
from anysize.tensors import expected_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from anysize.training.config import Recipe as TrainingRecipe

# What transformers calls the optimizers whose state this is.
ADAMW = ("adamw_torch", "adamw_torch_fused")
# A folder of its own: some loaders take every .safetensors file beside a config for weights.
FILE = Path("optimizer") / "adamw.safetensors"
# Above this, steps of elements without a past are much larger than the learning rate at first, because the count of
# steps, and with it the correction of Adam's bias, is the source's.
_MOST_BETA2 = 0.98
_MOMENTS = {"exp_avg": 1, "exp_avg_sq": 2}
# Of a head that was the embedding.
_UNTIED = "recipe.optimizer_state: the moments of a tied head are of both its uses, and untie parts them"


def save_state(model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the moments of AdamW into a model's folder, as `<moment>.<parameter>`, whole or not at all.

    Raises InputError where an optimizer has no such moments.
    """
    from safetensors.torch import save_file  # noqa: PLC0415

    state: Mapping[Any, Mapping[str, torch.Tensor]] = optimizer.state
    tensors: dict[str, torch.Tensor] = {}
    steps = 0
    for name, parameter in model.named_parameters():
        if parameter not in state:
            continue
        known = state[parameter]
        if missing := _MOMENTS.keys() - known.keys():
            raise InputError(f"keep_optimizer: '{name}' has no {sorted(missing)[0]}: only the state of AdamW is kept")
        steps = max(steps, int(known["step"]))
        tensors |= {f"{moment}.{name}": known[moment].detach().cpu().contiguous() for moment in _MOMENTS}
    place = folder / FILE
    place.parent.mkdir(exist_ok=True)
    partial = place.with_name(f".{place.name}.partial")
    save_file(tensors, partial, {"steps": str(steps)})
    partial.replace(place)


def _is_sharded(args: TrainingArguments) -> bool:
    launched = any(
        os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true" for kind in ("FSDP", "DEEPSPEED")
    )
    return bool(args.fsdp or args.deepspeed or launched)


def require_recipe(recipe: TrainingRecipe, args: TrainingArguments) -> None:
    """Refuse rates of their own, and a state that is carried on, for optimizers and shards that cannot have them."""
    carried = recipe.optimizer_state == "carried"
    if not (recipe.learning_rate_factors or recipe.new_parameters or carried):
        return
    if (optim := str(getattr(args.optim, "value", args.optim))) not in ADAMW:
        raise InputError(f"recipe: needs AdamW, and training.optim is {optim}")
    if (carried or recipe.new_parameters) and _is_sharded(args):
        name = "optimizer_state" if carried else "new_parameters"
        raise InputError(f"recipe.{name}: needs whole tensors, and this run shards them; leave it out")


def require_kept(args: TrainingArguments) -> None:
    """Refuse to keep what a run with these arguments does not have, before it is trained."""
    if (optim := str(getattr(args.optim, "value", args.optim))) not in ADAMW:
        raise InputError(f"keep_optimizer: only the state of AdamW is kept, and training.optim is {optim}")
    if _is_sharded(args):
        raise InputError("keep_optimizer: needs whole tensors, and this run shards them; leave it out")
    if args.load_best_model_at_end:
        raise InputError("keep_optimizer: training.load_best_model_at_end leaves weights that the moments are not of")


def require_state(folder: Path, args: TrainingArguments, recipe: TrainingRecipe) -> Path:
    """Return where the state of a source lies; raise InputError where there is none or a run cannot go on with it."""
    place = folder / FILE
    if not place.is_file():
        raise InputError(
            f"recipe.optimizer_state: the source '{folder}' has no {FILE}; train it with keep_optimizer: true, or "
            "leave the option out"
        )
    warmed = recipe.new_parameters is not None and recipe.new_parameters.warmup_steps > 0
    if args.adam_beta2 > _MOST_BETA2 and not warmed:
        raise InputError(
            f"recipe.optimizer_state: with adam_beta2 of {args.adam_beta2}, above {_MOST_BETA2}, new elements would "
            "take steps of several times the learning rate: give recipe.new_parameters.warmup_steps"
        )
    return place


def require_growth(recipe: TrainingRecipe, source: SourceConfig, target: SourceConfig, *, untie: bool) -> None:
    """Refuse what a recipe asks of what a plan adds, or keeps as it was, where sizes say that there is nothing such."""
    cut = [axis for axis, size in target.sizes.items() if size < source.sizes.get(axis, size)]
    if recipe.optimizer_state == "carried" and cut:
        raise InputError(
            "recipe.optimizer_state: gradients carry over to what computes the same, and this target does not: it has "
            f"less {', '.join(cut)} than its source"
        )
    if recipe.optimizer_state == "carried" and untie:
        raise InputError(_UNTIED)
    larger = any(size > source.sizes.get(axis, size) for axis, size in target.sizes.items())
    if recipe.new_parameters is not None and not larger:
        raise InputError("recipe.new_parameters: the plan adds no elements: no size of the target is larger")


def load_state(place: Path) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """Return moments by parameter, and the steps that they have seen."""
    from safetensors import safe_open  # noqa: PLC0415

    found: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(place, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            moment, _, name = key.partition(".")
            found.setdefault(name, {})[moment] = file.get_tensor(key)
        return found, int((file.metadata() or {}).get("steps", 0))


def _total(dim: DimMap, *, shared: bool) -> NDArray[np.float64]:
    """Return, of every source coordinate, what its copies add up to; 1 where they share it out."""
    if shared:
        return np.ones(dim.source_size)
    copied = dim.fill == Fill.COPY
    total = np.zeros(dim.source_size)
    np.add.at(total, dim.index[copied], dim.factor[copied])
    return total


def carried(recipe: Recipe, maps: DimMaps, moment: torch.Tensor, power: int) -> torch.Tensor:
    """Return a moment of a source tensor as the target tensor's: divided by A^power, zero where an element is new."""
    composed = maps.of(recipe)
    rows, columns = as_matrix(composed, tuple(recipe.shape))
    reads_first = parse(recipe.arrow).reads_first
    shared = recipe.share != "none"
    total = np.outer(
        _total(rows, shared=shared and reads_first), _total(columns, shared=shared and not reads_first)
    ) * recipe.factor  # fmt: skip
    # Coordinates that nothing inherits are not divided by.
    total[total == 0] = 1.0
    source = moment.double().reshape(rows.source_size, columns.source_size) / torch.from_numpy(total) ** power
    old = torch.from_numpy(np.outer(rows.fill == Fill.COPY, columns.fill == Fill.COPY))
    at_rows, at_columns = (torch.from_numpy(np.where(d.fill == Fill.COPY, d.index, 0)) for d in (rows, columns))
    made = torch.where(old, source[at_rows][:, at_columns], 0.0)
    return (torch.zeros_like(made) if recipe.silent else made).reshape(recipe.shape).to(moment.dtype)


def carried_state(plan: Plan, place: Path, model: PreTrainedModel) -> tuple[dict[str, dict[str, torch.Tensor]], int]:
    """Return the state of a target's AdamW, by parameter, from that of the source, and the steps it has seen.

    Raises InputError where the plan is not exact or unties a head, so that gradients do not carry over, and where
    transformers fuses tensors in memory.
    """
    if not plan.exact:
        raise InputError(
            "recipe.optimizer_state: gradients carry over to what computes the same, and this target does not: "
            f"{plan.inexact[0]}"
        )
    if plan.options.untie:
        raise InputError(_UNTIED)
    before, steps = load_state(place)
    maps = DimMaps(plan.axes, plan.dense)
    expected = expected_tensors(understand(plan.target_config))
    identities = {number for number, step in enumerate(plan.layers) if step.silent}
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for recipe in plan.recipes:
        if parameters.get(recipe.name) != tuple(recipe.shape) or recipe.source not in before:
            raise InputError(
                f"recipe.optimizer_state: '{recipe.name}' is not a tensor of its own in memory, or "
                f"'{recipe.source}' has no state beside the source"
            )
        known = before[recipe.source]
        if any(tuple(known[moment].shape) != tuple(recipe.source_shape) for moment in _MOMENTS):
            raise InputError(f"recipe.optimizer_state: the state of '{recipe.source}' is of another shape than it")
        found[recipe.name] = {m: carried(recipe, maps, known[m], power) for m, power in _MOMENTS.items()}
        if expected[recipe.name].layer in identities:
            # Behind a silent branch there is no gradient yet, whatever the layer that it copies has seen.
            found[recipe.name] = {m: torch.zeros_like(value) for m, value in found[recipe.name].items()}
    return found, steps


def set_state(
    optimizer: torch.optim.Optimizer,
    model: PreTrainedModel,
    state: Mapping[str, Mapping[str, torch.Tensor]],
    steps: int,
) -> None:
    """Give an optimizer of a model a state that another run has left."""
    parameters = dict(model.named_parameters())
    on_device = {
        parameter for group in optimizer.param_groups if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }  # fmt: skip
    for name, moments in state.items():
        parameter = parameters[name]
        step = torch.tensor(float(steps), device=parameter.device if parameter in on_device else "cpu")
        optimizer.state[parameter] = {
            "step": step, **{m: value.to(parameter.device, parameter.dtype) for m, value in moments.items()}
        }  # fmt: skip
