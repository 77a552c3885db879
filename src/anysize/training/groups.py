"""Which parameters train at which rate: by role in the architecture, and by whether a plan added them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from anysize.arch.schema import Norm
from anysize.config import SourceConfig
from anysize.dims import Fill
from anysize.errors import InputError
from anysize.executor import DimMaps, as_matrix
from anysize.recipe import Plan
from anysize.tensors import Expected, expected_tensors
from anysize.training.config import NewParameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _role(expected: Expected) -> str:
    """Return the role of a tensor. What holds queries, keys and values at once counts as query-key."""
    if isinstance(expected.origin, Norm):
        return "norm"
    reads, writes = ({str(f) for dim in dims for block in dim.blocks for f in block.factors}
                     for dims in (expected.arrow.reads, expected.arrow.writes))  # fmt: skip
    # GPT-NeoX has queries, keys and values as three parts of each head.
    if {"query(head)", "key(head)"} & writes or {"3", "head"} <= writes:
        return "query-key"
    if "ffn" in reads | writes:
        return "feed-forward"
    if "head" in reads | writes:
        return "value-output"
    if "hidden" in writes:
        return "embedding"
    return "other"


def roles(model: PreTrainedModel, config: SourceConfig) -> dict[str, str]:
    """Return the role of every trained parameter, by its name in memory."""
    from transformers.core_model_loading import revert_weight_conversion  # noqa: PLC0415

    expected = expected_tensors(config)
    found: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        # On disk it may have another name, or be several tensors, which then have one role.
        on_disk = revert_weight_conversion(model, {name: torch.empty(parameter.shape, device="meta")})
        # A bias goes with its weight: by itself it only says what it adds to.
        known = [expected.get(n.removesuffix(".bias") + ".weight", expected[n]) for n in on_disk if n in expected]
        found[name] = _role(known[0]) if known else "other"
    return found


def new_elements(plan: Plan, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return, by name in memory, which elements of a target the plan added: bool, of the parameter's shape.

    Tensors without such elements are left out. Raises InputError where transformers fuses tensors in memory.
    """
    maps = DimMaps(plan.axes, plan.dense)
    parameters = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    for recipe in plan.recipes:
        shape = tuple(recipe.shape)
        rows, columns = as_matrix(maps.of(recipe), shape)
        new = torch.from_numpy((rows.fill[:, None] != Fill.COPY) | (columns.fill[None, :] != Fill.COPY)).reshape(shape)
        if recipe.silent:
            new = torch.ones(shape, dtype=torch.bool)
        if not bool(new.any()):
            continue
        if recipe.name not in parameters or tuple(parameters[recipe.name].shape) != shape:
            raise InputError(
                f"recipe.new_parameters: '{recipe.name}' is not a tensor of its own in memory, where transformers "
                f"fuses or renames the tensors of {plan.model_type}"
            )
        found[recipe.name] = new
    if not found:
        raise InputError("recipe.new_parameters: the plan adds no elements (only fresh and larger vocabularies do)")
    return found


def grouped(
    model: PreTrainedModel, role_of: Mapping[str, str], factors: Mapping[str, float], rate: float, weight_decay: float,
    decayed: Iterable[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return optimizer groups: one for each role with a factor of its own, with and without weight decay."""
    decayed = set(decayed)
    made: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (factors.get(role_of[name], 1.0), weight_decay if name in decayed else 0.0)
            made.setdefault(key, []).append(parameter)
    return [{"params": params, "lr": rate * factor, "weight_decay": decay} for (factor, decay), params in made.items()]


def _warmed(step: int, warmup_steps: float) -> float:
    return 1.0 if step >= warmup_steps else (step + 1) / (warmup_steps + 1)


class ElementwiseAdamW(torch.optim.AdamW):
    """AdamW whose steps are scaled element by element: new elements by one factor, the others by another.

    `new` says which elements of a parameter are new. Parameters that are not in it are old as a whole. The warm-ups of
    `rates` are in steps (see NewParameters.of_run). `lr` is the rate that schedules take for the whole run's.
    """

    def __init__(
        self, groups: list[dict[str, Any]], new: Mapping[torch.nn.Parameter, torch.Tensor], rates: NewParameters, *,
        lr: float, betas: tuple[float, float], eps: float,
    ) -> None:  # fmt: skip
        super().__init__(groups, lr=lr, betas=betas, eps=eps)
        self.new, self.rates = new, rates

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of AdamW, then pull back each element to its own share of it."""
        # Kept among the groups, so that a resumed run goes on where it was. What AdamW itself counts may have begun in
        # another run (see optimizer_state).
        done: int = self.param_groups[0].get("num_steps", 0)
        self.param_groups[0]["num_steps"] = done + 1
        rates = self.rates
        fresh = rates.learning_rate_factor * _warmed(done, rates.warmup_steps)
        old = rates.old_learning_rate_factor * _warmed(done, rates.old_warmup_steps)
        before = {
            p: p.detach().clone()
            for group in self.param_groups
            for p in group["params"]
            if old != 1.0 or (p in self.new and fresh != 1.0)
        }
        loss = super().step(closure)
        for parameter, start in before.items():
            if parameter in self.new:
                share = torch.where(self.new[parameter], fresh, old).to(parameter.dtype)
                parameter.copy_(start + share * (parameter - start))
            else:
                parameter.lerp_(start, 1 - old)
        return loss
