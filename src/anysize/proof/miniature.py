"""Prove a plan on a miniature before any real tensor is touched: same table, same config flags, same kinds of maps.

A tiny random model of the same `model_type` is resized with the same options. Growth must reproduce its logits in
double precision, permuting any axis must leave them unchanged, and a deliberately wrong resize must not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch

from anysize.arch.expression import evaluate
from anysize.arch.schema import Architecture
from anysize.axis import keep, select
from anysize.config import SourceConfig, per_layer_values, understand
from anysize.errors import AnysizeError, ProofError
from anysize.executor import target_tensors
from anysize.fit import WRITE_HIDDEN
from anysize.io.models import NamedTensors, build_model, config_of, disk_tensors, new_model
from anysize.planner import make_plan, maps_plan
from anysize.presets import preset_named
from anysize.proof.cuts import check_cuts, check_tokens, check_turn, kept_sizes
from anysize.proof.distance import logit_error
from anysize.proof.precision import DoubleThroughout
from anysize.proof.verdict import Check, Verification
from anysize.recipe import Plan

TOLERANCE = 1e-9
_PERMUTED = ("hidden", "ffn", "kv", "group", "expert")
_LENGTH = 13


def _same_kind(source: int, target: int, small: int) -> list[int]:
    """Return the small target sizes whose ratio is of the same kind, the nearest first.

    Of one kind are ratios with the same whole part that are both whole, or both not.
    """
    if source == target:
        return [small]
    whole, rest = divmod(target, source)
    if rest == 0:
        return [whole * small]
    return sorted(range(whole * small + 1, (whole + 1) * small), key=lambda size: abs(size * source - small * target))


@dataclass(frozen=True)
class MiniatureSizes:
    """The sizes of a miniature, by axis."""

    source: Mapping[str, int]
    target: Mapping[str, int]


def _with_sizes(config: SourceConfig, sizes: Mapping[str, int], changes: Mapping[str, Any]) -> dict[str, Any]:
    keys = config.architecture.keys
    values = {**sizes, "heads": sizes["kv"] * sizes["group"]}
    raw = {**config.raw, **{key: values[axis] for axis, key in keys.items()}, **changes}
    for key, followed in config.architecture.follows.items():
        if config.full[key] == config.full[followed]:
            raw[key] = raw[followed]
    return raw


def _legal(architecture: Architecture, raw: Mapping[str, Any]) -> bool:
    full = {**architecture.defaults, **raw}
    return all(evaluate(rule.holds, full) for rule in architecture.rules)


def _few_experts(config: SourceConfig) -> int:
    """Return the fewest experts of which one may be cut and the router still has a choice, or all there are."""
    sizes = config.sizes
    few = (
        n
        for n in range(1, sizes["expert"] + 1)
        if _legal(config.architecture, _with_sizes(config, {**sizes, "expert": n}, {}))
    )
    return min(next(few) + 2, sizes["expert"])


def smallest_sizes(config: SourceConfig, new: Mapping[str, int]) -> MiniatureSizes:
    """Return the smallest source and target sizes with the plan's kinds of ratios that the family's rules allow.

    Raises ProofError where there are none: then the plan cannot be proved.
    """
    old = config.sizes
    separate = "head" in config.architecture.keys
    fixed = {**old, "ffn": 11} | ({"vocab": 37} if "vocab" in old else {})
    if "expert" in old:
        fixed["expert"] = _few_experts(config)
    grown = {axis: _same_kind(old[axis], new[axis], size)[0] for axis, size in fixed.items() if axis != "hidden"}
    heads = ([1] if old["kv"] == 1 else [2, 3, 4, 5], [1] if old["group"] == 1 else [2, 3, 4])
    for kv, group, hidden in product(*heads, range(8, 97) if separate else [0]):
        small = {**fixed, "kv": kv, "group": group, "hidden": hidden or kv * group * old["head"]}
        if not _legal(config.architecture, _with_sizes(config, small, {})):
            continue
        more = (_same_kind(old[axis], new[axis], small[axis]) for axis in ("kv", "group"))
        for new_kv, new_group in product(*more):
            large = {**grown, "kv": new_kv, "group": new_group, "head": new["head"]}
            tied_width = [new_kv * new_group * new["head"]]
            for new_hidden in _same_kind(old["hidden"], new["hidden"], small["hidden"]) if separate else tied_width:
                large["hidden"] = new_hidden
                kinds = all(_kind(old[axis], new[axis]) == _kind(small[axis], large[axis]) for axis in small)
                if kinds and _legal(config.architecture, _with_sizes(config, large, {})):
                    return MiniatureSizes(small, large)
    raise ProofError(
        f"no miniature of this {config.architecture.model_type} has the ratios {dict(old)} -> {dict(new)}: "
        "the plan cannot be proved and is refused"
    )


def _kind(source: int, target: int) -> tuple[int, bool]:
    return target // source, target % source == 0


def _small_changes(config: SourceConfig, num_layers: int) -> dict[str, Any]:
    """Return the config changes that make a miniature cheap and keep every flag that its function depends on."""
    changes: dict[str, Any] = {key: None for key in ("bos_token_id", "eos_token_id") if key in config.raw}
    if "vocab" in config.sizes:
        # Some families default to a padding row that a tiny vocabulary does not have.
        changes["pad_token_id"] = 0
    for key in config.architecture.per_layer:
        values = per_layer_values(config, key)
        if values:
            kinds = list(dict.fromkeys(values))
            changes[key] = [kinds[i % len(kinds)] for i in range(num_layers)]
    if config.full.get("sliding_window"):
        changes["sliding_window"] = 5
    changes["architectures"] = [config.model_class]
    changes.pop("dtype", None)
    return changes


def _num_layers(config: SourceConfig) -> int:
    kinds = [len(set(per_layer_values(config, key) or ())) for key in config.architecture.per_layer]
    return min(config.sizes["layer"], max([2, *kinds]))


@torch.no_grad()
def random_weights(model: torch.nn.Module, seed: int) -> None:
    """Fill a model so that every mistake shows: biases are not zero and gains are not one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            base = parameter.to(torch.float64) if name.endswith("weight") else torch.zeros_like(noise)
            parameter.copy_(base + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.5 / parameter.shape[-1] ** 0.5 if "embed" not in name else 0.5))


def _inputs(config: SourceConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    if config.architecture.modality == "image":
        size, channels = config.full["image_size"], config.full["num_channels"]
        return {"pixel_values": torch.randn((2, channels, size, size), generator=generator, dtype=torch.float64)}
    length = min(_LENGTH, getattr(config_of(config.raw), "max_position_embeddings", None) or _LENGTH)
    return {"input_ids": torch.randint(1, config.sizes["vocab"], (2, length), generator=generator)}


def _logits(
    plan_class: str, raw: Mapping[str, Any], tensors: dict[str, torch.Tensor], inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    model = build_model(plan_class, raw, tensors, torch.float64)
    with torch.no_grad(), DoubleThroughout():
        return model(**inputs).logits


def _miniature_source(config: SourceConfig, sizes: Mapping[str, int], seed: int) -> NamedTensors:
    raw = _with_sizes(config, sizes, _small_changes(config, sizes["layer"]))
    model = new_model(config.model_class, raw, torch.float64)
    random_weights(model, seed)
    return NamedTensors(raw, disk_tensors(model))


def _request(config: SourceConfig, sizes: MiniatureSizes) -> dict[str, int]:
    target = sizes.target
    keys = config.architecture.keys
    request = {
        "hidden_size": target["hidden"],
        "intermediate_size": target["ffn"],
        "num_hidden_layers": target["layer"],
    }
    request["num_attention_heads"] = target["kv"] * target["group"]
    if "kv" in keys:
        request["num_key_value_heads"] = target["kv"]
    if "vocab" in target:
        request["vocab_size"] = target["vocab"]
    return request


def mistaken(plan: Plan) -> Plan:
    """Return the plan with one mistake: whatever reads the residual stream does not divide by its share."""
    recipes = tuple(
        r.model_copy(update={"factor": r.factor * 1.5}) if r.arrow.startswith(("norm(hidden) ->", "hidden ->")) else r
        for r in plan.recipes
    )
    return plan.model_copy(update={"recipes": recipes})


def prove_on_miniature(plan: Plan) -> Verification:
    """Return the proof that the plan's table and kinds of maps keep the function, on a tiny model of the same flags.

    Growth must keep the logits, with every cut axis left as it is; cuts and turns have checks of their own. Depth and
    vocabulary changes that the plan itself calls inexact are left out of the comparison. Raises
    ProofError where no miniature exists; a failed check is returned, not raised.
    """
    config, target = understand(plan.source_config), understand(plan.target_config)
    sizes = smallest_sizes(config, kept_sizes(config, target))
    layers = _num_layers(config)
    grows = target.sizes["layer"] > config.sizes["layer"] and plan.options.layers in ("auto", "identity")
    small = MiniatureSizes(
        {**sizes.source, "layer": layers}, {**sizes.target, "layer": layers + 1 if grows else layers}
    )
    source = _miniature_source(config, small.source, plan.seed)
    growth = preset_named(plan.options.preset).name
    plain = {"preset": growth, "select": "auto", "readers": "auto", "dtype": "keep"}
    options = plan.options.with_layers("identity" if grows else "auto").model_copy(update=plain)
    inputs = _inputs(understand(source.config))
    wanted = _logits(plan.model_class, source.config, dict(source_tensors(source)), inputs)

    def error(made: Plan) -> float:
        return logit_error(wanted, _logits(made.model_class, made.target_config, target_tensors(made, source), inputs))

    try:
        mini = make_plan(source, _request(config, small), options)
    except AnysizeError as refusal:
        raise ProofError(f"the miniature of this plan is refused: {refusal}") from refusal
    changes = [f"{axis} {n} -> {small.target[axis]}" for axis, n in small.source.items() if n != small.target[axis]]
    checks = [
        Check(
            name="miniature",
            what=f"logits of a tiny {plan.model_type}, {', '.join(changes) or 'equal sizes'}",
            unit="of the logits' std",
            measured=error(mini),
            tolerance=TOLERANCE,
            control=error(mistaken(mini)),
        )
    ]
    shuffle = np.random.default_rng(plan.seed)
    for axis in _PERMUTED:
        size = small.source.get(axis, 1)
        if size < 2:
            continue
        maps = {a: keep(n) for a, n in small.source.items() if a != "layer"}
        maps[axis] = select(size, _cycle(size, shuffle))
        permuted = maps_plan(source, maps)
        checks.append(
            Check(name=f"permute {axis}", what="logits after permuting the axis", unit="of the logits' std",
                  measured=error(permuted), tolerance=TOLERANCE, control=error(_half_permuted(permuted, axis)))
        )  # fmt: skip

    def logits(tensors: NamedTensors, given: dict[str, torch.Tensor] = inputs) -> torch.Tensor:
        return _logits(plan.model_class, tensors.config, dict(source_tensors(tensors)), given)

    checks += check_cuts(plan, source, logits)
    if plan.kept_tokens is not None:
        checks.append(check_tokens(source, inputs["input_ids"], lambda t, ids: logits(t, {"input_ids": ids})))
    if WRITE_HIDDEN in plan.dense:
        checks.append(check_turn(source, logits))
    return Verification(checks=tuple(checks))


def _cycle(size: int, generator: np.random.Generator) -> list[int]:
    """Return a random permutation in one cycle: it moves every coordinate, however few there are."""
    order = generator.permutation(size)
    moved = np.empty(size, np.int64)
    moved[order] = np.roll(order, 1)
    return moved.tolist()


def _half_permuted(plan: Plan, axis: str) -> Plan:
    """Return the permutation with one mistake: the first matrix that reads the axis keeps its old order.

    Nothing reads `expert`, whose tensors lie apart; there it is the first router, which writes it.
    """
    reads = axis != "expert"
    for i, recipe in enumerate(plan.recipes):
        side = recipe.arrow.split("->")[0 if reads else 1]
        if axis in side.replace("(", " ").replace(")", " ").split() and len(recipe.shape) > 1:
            arrow = _frozen(recipe.arrow, axis, plan.axes[axis].source_size, reads=reads)
            fixed = recipe.model_copy(update={"arrow": arrow})
            return plan.model_copy(update={"recipes": (*plan.recipes[:i], fixed, *plan.recipes[i + 1 :])})
    raise ProofError(f"nothing reads the axis '{axis}', so permuting it proves nothing")


def _frozen(arrow: str, axis: str, size: int, *, reads: bool) -> str:
    left, _, right = arrow.partition("->")
    frozen = left if reads else right
    for spelled in (f"norm({axis})", f"query({axis})", f"key({axis})", axis):
        if spelled in frozen:
            frozen = frozen.replace(spelled, str(size), 1)
            break
    return f"{frozen}->{right}" if reads else f"{left}->{frozen}"


def source_tensors(source: NamedTensors) -> dict[str, torch.Tensor]:
    """Return all tensors of a source in memory."""
    return {name: source.read(name) for name in source.tensors}
