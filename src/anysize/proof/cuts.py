"""Prove on a miniature that what is cut is cut alike everywhere, and that turning the residual stream loses nothing.

Cutting coordinates of an axis must give exactly the source in which nothing reads those coordinates; turning the
stream by a full set of principal directions, with every gain folded into the readers, must not change the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from anysize.axis import keep, select
from anysize.calibration.run import Collector
from anysize.calibration.scores import Record, Scores
from anysize.calibration.statistics import averages
from anysize.config import SourceConfig, understand
from anysize.dense import DenseMaps, Matrix
from anysize.dims import compose
from anysize.executor import target_tensors
from anysize.fit import WRITE_HIDDEN, Fit
from anysize.io.models import NamedTensors, build_model
from anysize.planner import maps_plan
from anysize.presets import bound
from anysize.proof.coverage import check_source
from anysize.proof.distance import logit_error
from anysize.proof.verdict import Check
from anysize.recipe import Plan
from anysize.shrink import CHOSEN_PER_LAYER, SHRINK_PRESETS
from anysize.target import resolve
from anysize.tensors import expected_tensors

# Statistics are kept in single precision, so turning is exact to that only.
TURN_TOLERANCE = 1e-4
_CALIBRATION_TOKENS = (48, 13)
_UNIT = "of the logits' std"
Logits = Callable[[NamedTensors], torch.Tensor]


def _silenced(source: NamedTensors, config: SourceConfig, axis: str, kept: list[int]) -> NamedTensors:
    """Return the source with nothing reading the coordinates that are not kept."""
    maps = {a: keep(n) for a, n in config.sizes.items()} | {axis: select(config.sizes[axis], kept)}
    state = {name: source.read(name).clone() for name in source.tensors}
    for name, expected in expected_tensors(config).items():
        arrow = expected.arrow
        for position, dim in enumerate(arrow.dims):
            if axis in dim.axes and dim in arrow.reads:
                index = torch.from_numpy(compose(dim, maps, writes=False).index)
                mask = torch.zeros(state[name].shape[position], dtype=torch.float64)
                mask[index] = 1
                state[name] = (state[name].movedim(position, -1) * mask).movedim(-1, position).contiguous()
    return NamedTensors(source.config, state)


class _NeverRouted(TorchFunctionMode):
    """While active, the routers of a source give the experts that are not kept minus infinity: no token goes there."""

    def __init__(self, source: NamedTensors, config: SourceConfig, kept: list[int]) -> None:
        super().__init__()
        self.cut = [expert for expert in range(config.sizes["expert"]) if expert not in kept]
        self.routers = [
            source.read(name) for name, e in expected_tensors(config).items() if str(e.arrow.writes[0]) == "expert"
        ]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and any(args[1].equal(router) for router in self.routers):
            made[..., self.cut] = -torch.inf
        return made


def _without(source: NamedTensors, config: SourceConfig, axis: str, kept: list[int], logits: Logits) -> torch.Tensor:
    """Return the logits of the source where nothing reads, or is routed to, the coordinates that are not kept."""
    if axis == "expert":
        with _NeverRouted(source, config, kept):
            return logits(source)
    return logits(_silenced(source, config, axis, kept))


def _cut_request(config: SourceConfig, axis: str, size: int) -> dict[str, int]:
    sizes = {**config.sizes, axis: size}
    if axis in ("ffn", "expert"):
        return {{"ffn": "intermediate_size", "expert": "num_experts"}[axis]: size}
    request = {"num_attention_heads": sizes["kv"] * sizes["group"]}
    return request | ({"num_key_value_heads": sizes["kv"]} if "kv" in config.architecture.keys else {})


def check_cuts(plan: Plan, source: NamedTensors, logits: Logits) -> list[Check]:
    """Return a check for every cut axis of experts, heads and neurons that the miniature can cut by itself."""
    config = understand(source.config)
    found: list[Check] = []
    for axis in CHOSEN_PER_LAYER:
        size = config.sizes.get(axis, 1)
        is_cut = plan.axes[axis].target_size < plan.axes[axis].source_size if axis in plan.axes else False
        # Where heads make up the width, or a norm spans them, they cannot be cut with all else equal.
        alone = axis in ("expert", "ffn") or ("head" in config.architecture.keys and not bound(config, axis))
        if not is_cut or not alone or size < 2:
            continue
        # Of experts all but one stay, so that the router still has a choice.
        kept = [0, *range(2, size)] if axis == "expert" else sorted({0, size - 1})[: size - 1]
        target = resolve(config, _cut_request(config, axis, len(kept)))
        maps = {a: keep(n) for a, n in config.sizes.items() if a != "layer"} | {axis: select(size, kept)}
        cut = maps_plan(source, maps, target)
        wanted = _without(source, config, axis, kept, logits)
        got = logits(NamedTensors(cut.target_config, target_tensors(cut, source)))
        wrong = logits(source)
        unused = "no token routed to" if axis == "expert" else "nothing reading"
        what = f"logits with {axis} {size} -> {len(kept)}, against {unused} the rest"
        found.append(
            Check(name=f"cut {axis}", what=what, unit=_UNIT, measured=logit_error(wanted, got), tolerance=1e-9,
                  control=logit_error(wrong, got))
        )  # fmt: skip
    return found


def check_tokens(
    source: NamedTensors, ids: torch.Tensor, logits: Callable[[NamedTensors, torch.Tensor], torch.Tensor]
) -> Check:
    """Return the check that cutting every third token keeps the others' logits; its control is read under old ids."""
    config = understand(source.config)
    size = config.sizes["vocab"]
    kept = torch.tensor([i for i in range(size) if i % 3 != 1])
    target = resolve(config, {"vocab_size": len(kept)})
    maps = {a: keep(n) for a, n in config.sizes.items() if a != "layer"} | {"vocab": select(size, kept.tolist())}
    cut = maps_plan(source, maps, target)
    made, ids = NamedTensors(cut.target_config, target_tensors(cut, source)), ids % len(kept)
    got = logits(made, ids)
    wanted, wrong = logits(source, kept[ids])[..., kept], logits(source, ids)[..., : len(kept)]
    what = f"logits of kept tokens with vocab {size} -> {len(kept)}, against the source's"
    return Check(name="cut vocab", what=what, unit=_UNIT, measured=logit_error(wanted, got), tolerance=1e-9,
                 control=logit_error(wrong, got))  # fmt: skip


def miniature_scores(source: NamedTensors, config: SourceConfig) -> Scores:
    """Return the scores of a miniature on random inputs."""
    model = build_model(config.model_class, source.config, {n: source.read(n) for n in source.tensors}, torch.float64)
    generator = torch.Generator().manual_seed(2)
    if config.architecture.modality == "image":
        shape = (64, config.full["num_channels"], config.full["image_size"], config.full["image_size"])
        batch = {"pixel_values": torch.randn(shape, generator=generator, dtype=torch.float64)}
    else:
        batch = {"input_ids": torch.randint(0, config.sizes["vocab"], _CALIBRATION_TOKENS, generator=generator)}
    collector = Collector(model, config, second_moments=True)
    with collector.attached():
        collector.run([batch], lambda _items: None)
    record = Record(
        model_sha256="", model_type=config.architecture.model_type, source="miniature", data="random",
        data_sha256="", tokens=0, sequence_length=0, batch_size=0, second_moments=True,
        samples=_CALIBRATION_TOKENS[0] * _CALIBRATION_TOKENS[1], aliases=collector.aliases, feeds=collector.feeds,
    )  # fmt: skip
    return Scores(record, {site: averages(sums.as_tensors()) for site, sums in collector.sums.items()}, {})


def _with_plain_final_norm(source: NamedTensors, config: SourceConfig) -> NamedTensors:
    module = config.architecture.final_norm
    ones = 0.0 if config.architecture.norms[module].gain == "1+w" else 1.0
    state = {name: source.read(name) for name in source.tensors}
    state[f"{module}.weight"] = torch.full_like(state[f"{module}.weight"], ones)
    if f"{module}.bias" in state:
        state[f"{module}.bias"] = torch.zeros_like(state[f"{module}.bias"])
    return NamedTensors(source.config, state)


def check_turn(source: NamedTensors, logits: Logits) -> Check:
    """Return the check that a full turn of the residual stream keeps the logits; its control turns the writers only.

    A tied head cannot fold the final gain and bias in, so there it is tried with a gain of 1 and no bias.
    """
    config = understand(source.config)
    if config.tied:
        source = _with_plain_final_norm(source, config)
    maps = {axis: keep(size) for axis, size in config.sizes.items() if axis != "layer"}
    names, _ = check_source(config, source)
    plan = maps_plan(source, maps, resolve(config, {}))
    fit = Fit(
        config, config, source, names, miniature_scores(source, config), SHRINK_PRESETS["subspace"], plan.layers, maps,
        turns=True, ridge=1e-9,
    )  # fmt: skip
    made = fit.run()

    def turned(dense: dict[str, Matrix]) -> torch.Tensor:
        recipes = tuple(r.model_copy(update=made.fields.get(r.name, {})) for r in plan.recipes)
        full = plan.model_copy(update={"recipes": recipes, "dense": DenseMaps(dense)})
        return logits(NamedTensors(full.target_config, target_tensors(full, source)))

    wanted = logits(source)
    shifted = {**made.dense, WRITE_HIDDEN: made.dense[WRITE_HIDDEN][::-1].copy()}
    return Check(
        name="turn hidden",
        what="logits after turning the residual stream to its principal directions, all of them kept",
        unit=_UNIT,
        measured=logit_error(wanted, turned(dict(made.dense))),
        tolerance=TURN_TOLERANCE,
        control=logit_error(wanted, turned(shifted)),
    )


def kept_sizes(config: SourceConfig, target: SourceConfig) -> dict[str, int]:
    """Return the target's sizes with every cut axis as it was: what growth alone has to reproduce.

    Where heads are as wide together as the stream, that is as wide as they become: fewer kv heads with all of their
    query heads grow the group, and fewer but wider heads their width.
    """
    sizes = {axis: max(size, target.sizes[axis]) for axis, size in config.sizes.items()}
    if "head" not in config.architecture.keys:
        sizes["hidden"] = max(sizes["hidden"], sizes["kv"] * sizes["group"] * sizes["head"])
    return sizes
