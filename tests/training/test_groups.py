"""Rates by role and by age: every parameter has a role, new elements are those that a plan added, steps are scaled."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.config import understand
from anysize.errors import InputError
from anysize.io.models import build_model
from anysize.progress import quiet
from anysize.training.config import ROLES, NewParameters, train_config
from anysize.training.groups import ElementwiseAdamW, grouped, new_elements, roles
from anysize.training.run import train
from tests import tiny
from tests.training.runs import config_of


@pytest.mark.parametrize("family", sorted({v.family for v in tiny.VARIANTS}))
def test_every_parameter_of_every_family_has_a_role(family: str) -> None:
    source = tiny.source(next(v for v in tiny.VARIANTS if v.family == family))
    config = understand(source.config)
    tensors = {name: source.read(name) for name in source.tensors}
    model = build_model(config.model_class, config.full, tensors, torch.float32)
    found = roles(model, config)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert set(found.values()) <= set(ROLES)
    assert {"embedding", "query-key", "feed-forward"} <= set(found.values())
    # Only heads, routers and pooling are of no role.
    assert all("head" in n or "classifier" in n or "gate" in n or "embed_out" in n
               for n, role in found.items() if role == "other")  # fmt: skip
    # What is added to the stream within a layer is no embedding.
    assert all(found[n] == found[w] for n in found if n.endswith(".bias") and (w := f"{n[:-4]}weight") in found)
    assert not any(role == "embedding" and "layer" in n.rpartition(".")[0] for n, role in found.items())


def test_new_elements_are_those_that_growth_added(llama: Path) -> None:
    plan = anysize.plan(llama, intermediate_size=64, num_hidden_layers=3, preset="fresh")
    model = anysize.apply(plan, verify="off")
    found = new_elements(plan, model)  # type: ignore[arg-type]
    gate = found["model.layers.0.mlp.gate_proj.weight"]
    assert gate.shape == (64, 32)
    assert not bool(gate[:48].any())
    assert bool(gate[48:].all())
    assert "model.layers.0.self_attn.q_proj.weight" not in found
    # The layer that starts as an identity ends its branches with zeros, which are all new.
    silent = [recipe for recipe in plan.recipes if recipe.silent]
    assert silent
    assert all(int(found[recipe.name].sum()) == prod(recipe.shape) for recipe in silent)


def test_a_plan_that_adds_nothing_has_no_new_elements(llama: Path) -> None:
    plan = anysize.plan(llama, intermediate_size=96, preset="hypercloning")
    with pytest.raises(InputError, match="adds no elements"):
        new_elements(plan, anysize.apply(plan, verify="off"))  # type: ignore[arg-type]


def _trained(rates: NewParameters | None, steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    parameter = torch.nn.Parameter(torch.arange(6.0))
    new = torch.tensor([False, False, False, True, True, True])
    groups = [{"params": [parameter], "lr": 0.1, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1) if rates is None else ElementwiseAdamW(
        groups, {parameter: new}, rates, lr=0.1, betas=(0.9, 0.999), eps=1e-8)  # fmt: skip
    for _ in range(steps):
        optimizer.zero_grad()
        (parameter**2).sum().backward()
        optimizer.step()
    return parameter.detach()[:3], parameter.detach()[3:]


def test_factors_of_one_are_plain_adamw() -> None:
    for one, other in zip(_trained(None), _trained(NewParameters()), strict=True):
        assert torch.equal(one, other)


def test_a_factor_of_zero_keeps_elements_where_they_are() -> None:
    old, new = _trained(NewParameters(learning_rate_factor=0))
    assert torch.equal(new, torch.tensor([3.0, 4.0, 5.0]))
    assert torch.equal(old, _trained(None)[0])
    old, new = _trained(NewParameters(old_learning_rate_factor=0))
    assert torch.equal(old, torch.tensor([0.0, 1.0, 2.0]))
    assert torch.equal(new, _trained(None)[1])


def test_a_warm_up_takes_smaller_steps_at_first() -> None:
    first = [abs(float(_trained(NewParameters(warmup_steps=w), 1)[1][0]) - 3) for w in (0, 1, 3)]
    assert first[0] == pytest.approx(0.1, rel=1e-3)
    assert first[1] == pytest.approx(0.05, rel=1e-3)
    assert first[2] == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize(
    "asked", [{"warmup_steps": 0.2, "old_warmup_steps": 0.5}, {"warmup_steps": 4, "old_warmup_steps": 10}]
)
def test_a_warm_up_may_be_a_share_of_the_run(asked: dict[str, float]) -> None:
    rates = NewParameters(**asked).of_run(20)  # type: ignore[arg-type]
    assert (rates.warmup_steps, rates.old_warmup_steps) == (4, 10)
    assert NewParameters().of_run(20) == NewParameters()


def test_groups_hold_every_parameter_once_at_its_rate(llama: Path) -> None:
    model = anysize.resize(llama, intermediate_size=50, verify="off")
    config = understand(model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]})  # type: ignore[union-attr]
    role_of = roles(model, config)  # type: ignore[arg-type]
    groups = grouped(model, role_of, {"norm": 0.5, "query-key": 8.0}, 0.01, 0.1, ["model.embed_tokens.weight"])  # type: ignore[arg-type]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())  # type: ignore[union-attr]
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():  # type: ignore[union-attr]
        wanted = {"norm": 0.005, "query-key": 0.08}.get(role_of[name], 0.01)
        assert rate_of[id(parameter)] == pytest.approx(wanted), name


def _rates(config: dict[str, Any], output: Path) -> list[float]:
    train(train_config(config | {"output": str(output)}, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    state = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_scheduler_kwargs": {"min_lr": 4e-4}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 2e-3}},
    ],
)
def test_schedules_go_from_the_rate_of_the_run_whatever_recipe_it_has(
    llama: Path, story: Path, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    resize = {"source": str(llama), "intermediate_size": 96}
    training = {"learning_rate": 4e-3, "warmup_steps": 0, "logging_steps": 1, "save_steps": 12, **schedule}
    config = config_of(llama, story, tmp_path, resize=resize, training=training) | {"model": ""}
    plain = _rates(config, tmp_path / "plain")
    assert len(plain) == 12
    assert min(plain) < 0.6 * max(plain)
    recipe = {"new_parameters": {"learning_rate_factor": 1.3}}
    assert _rates(config | {"recipe": recipe}, tmp_path / "apart") == pytest.approx(plain)
