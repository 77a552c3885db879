"""Wrong plans and wrong models: what the comparison of whole models is there for, check by check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.api import apply_with_proof
from anysize.axis import select
from anysize.errors import ProofError
from anysize.io.reader import Checkpoint
from anysize.proof.coverage import account
from anysize.proof.parity import Comparison, load
from anysize.proof.replan import differences
from anysize.recipe import Plan, Recipe

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}
CLASS = "LlamaForCausalLM"


def edited(plan: Plan, end: str, edit: Callable[[Recipe], dict[str, Any]]) -> Plan:
    recipes = tuple(r.model_copy(update=edit(r)) if r.name.endswith(end) else r for r in plan.recipes)
    assert recipes != plan.recipes
    return plan.model_copy(update={"recipes": recipes})


def one_layer_on(recipe: Recipe) -> dict[str, Any]:
    here, there = (".0.", ".1.") if ".0." in recipe.source else (".1.", ".0.")
    return {"source": recipe.source.replace(here, there)}


def swapped(one: str, other: str) -> Callable[[Recipe], dict[str, Any]]:
    return lambda r: {"source": r.source.replace(one, other) if one in r.source else r.source.replace(other, one)}


WRONG: dict[str, tuple[str, Callable[[Recipe], dict[str, Any]]]] = {
    "a factor": ("model.norm.weight", lambda r: {"factor": r.factor * 1.01}),
    "equal shares left out": ("mlp.down_proj.weight", lambda _: {"share": "none"}),
    "kv and group swapped": ("q_proj.weight", lambda r: {"arrow": r.arrow.replace("kv group", "group kv")}),
    "gate and up swapped": ("_proj.weight", swapped("gate_proj", "up_proj")),
    "one layer on": ("mlp.up_proj.weight", one_layer_on),
    "a layer silenced": ("layers.1.mlp.down_proj.weight", lambda _: {"silent": True}),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("output", ["out", None], ids=["disk", "memory"])
def test_an_edited_plan_is_refused_even_where_nothing_is_compared(
    llama: Path, tmp_path: Path, name: str, output: str | None
) -> None:
    wrong = edited(anysize.plan(llama, preset="hypercloning", **SIZES), *WRONG[name])
    with pytest.raises(ProofError, match=r"^the plan is not what this version makes of its source and options: .* of "):
        anysize.apply(wrong, None if output is None else tmp_path / output, verify="off")
    assert list(tmp_path.iterdir()) == []


EDITS: dict[str, tuple[Callable[[Plan], dict[str, Any]], str]] = {
    "a map": (
        lambda p: {"axes": {**p.axes, "hidden": select(32, [*range(24), *range(24), *range(16)])}},
        "the map of hidden is",
    ),
    "eps": (
        lambda p: {"target_config": {**p.target_config, "rms_norm_eps": 1e-3}},
        "target_config.rms_norm_eps is 0.001",
    ),
    "the activation": (
        lambda p: {"target_config": {**p.target_config, "hidden_act": "gelu"}},
        "target_config.hidden_act is 'gelu', planned 'silu'",
    ),
    "a layer": (lambda p: {"layers": p.layers[::-1]}, "the layer plan is [1, 0], planned [0, 1]"),
}


@pytest.mark.parametrize("name", EDITS)
def test_whatever_else_is_edited_is_named(llama: Path, tmp_path: Path, name: str) -> None:
    plan = anysize.plan(llama, preset="hypercloning", **SIZES)
    edit, why = EDITS[name]
    with pytest.raises(ProofError) as refusal:
        anysize.apply(plan.model_copy(update=edit(plan)), tmp_path / "out", verify="off")
    assert why in str(refusal.value)


def test_a_cut_plan_may_choose_but_not_repeat(llama: Path, scores: Any) -> None:
    plan = anysize.plan(llama, preset="subcloning", calibration=scores, hidden_size=16, intermediate_size=24)
    assert not differences(plan, Checkpoint(llama))
    other = plan.model_copy(update={"axes": {**plan.axes, "hidden": select(32, range(16))}})
    assert not differences(other, Checkpoint(llama))
    twice = plan.model_copy(update={"axes": {**plan.axes, "ffn.1": select(48, [0] * 24)}})
    assert differences(twice, Checkpoint(llama)) == [
        "the map of ffn.1 is no choice: it repeats coordinates or adds new ones"
    ]
    unread = edited(plan, "up_proj.weight", lambda r: {"arrow": r.arrow.replace("ffn", "hidden")})
    assert any("arrow of" in found for found in differences(unread, Checkpoint(llama)))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_fails_its_proof_and_leaves_nothing(
    llama: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a plan agrees with itself: only the function it makes gives it away."""
    monkeypatch.setattr("anysize.proof.replan.differences", lambda *_: [])
    wrong = edited(anysize.plan(llama, preset="hypercloning", **SIZES), *WRONG[name])
    with pytest.raises(ProofError, match=r"^the (comparison of the whole models|proof of the written tensors) failed"):
        apply_with_proof(wrong, tmp_path / "new" / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProofError, match=r"^the (comparison of the whole models|proof of the tensors made) failed"):
        anysize.apply(wrong)


def test_old_logits_are_required_where_only_tokens_are_added(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = anysize.plan(llama, hidden_size=48, pad_vocab_to_multiple_of=16)
    assert not plan.exact
    assert plan.keeps_logits
    wrong = edited(plan, "model.norm.weight", lambda _: {"factor": 3.0})
    monkeypatch.setattr("anysize.proof.replan.differences", lambda *_: [])
    with pytest.raises(ProofError, match="the comparison of the whole models failed"):
        anysize.apply(wrong, tmp_path / "out")


def test_the_account_names_what_is_made_twice_not_at_all_or_from_nothing(llama: Path) -> None:
    plan, source = anysize.plan(llama, **SIZES), Checkpoint(llama)
    account(plan, source)
    first, second, *rest = plan.recipes
    wrong = plan.model_copy(update={"recipes": (first, first, *rest)})
    with pytest.raises(ProofError) as refusal:
        account(wrong, source)
    assert str(refusal.value) == (
        f"the plan does not account for every tensor: {first.name} is made 2 times; {second.name} is not made; "
        f"{second.source} of the source is neither used nor dropped"
    )


@pytest.fixture(scope="module")
def models(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The source and a grown target, loaded."""
    output = tmp_path_factory.mktemp("grown") / "out"
    anysize.resize(llama, output, verify="off", **SIZES)
    return load(llama, CLASS), load(output, CLASS)


def failing(models: tuple[Any, Any], spoil: Callable[[Any], object]) -> set[str]:
    source, target = models[0], copy.deepcopy(models[1])
    spoil(target)
    proof = Comparison(source, target, torch.float32).run(full=True)
    return {check.name for check in proof.checks if not check.passed}


def test_a_right_target_fails_no_check(models: tuple[Any, Any]) -> None:
    assert failing(models, lambda _: None) == set()


def forgets_the_cache(model: Any) -> None:
    """Give every token after the prompt position 0: only running through the cache shows it."""
    forward = model.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            kwargs["position_ids"] = torch.zeros_like(kwargs["input_ids"])
        return forward(*args, **kwargs)

    model.forward = wrong


def ignores_padding(model: Any) -> None:
    """Attend to the pad as well: only padded rows show it."""
    forward = model.forward

    def wrong(*args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor):
            kwargs["attention_mask"] = torch.ones_like(mask)
        return forward(*args, **kwargs)

    model.forward = wrong


def prefers_another_token(model: Any) -> None:
    generate = model.generate
    model.generate = lambda *args, **kwargs: generate(*args, **kwargs).roll(1, dims=1)


def saves_something_else(model: Any) -> None:
    save = model.save_pretrained

    def wrong(folder: str) -> None:
        spoilt = copy.deepcopy(model.state_dict())
        spoilt["model.norm.weight"] *= 1.001
        save(folder, state_dict=spoilt)

    model.save_pretrained = wrong


@pytest.mark.parametrize(
    ("spoil", "caught"),
    [
        (forgets_the_cache, "cache"),
        (ignores_padding, "left padding"),
        (prefers_another_token, "greedy"),
        (saves_something_else, "reload"),
    ],
)
def test_each_check_sees_what_the_plain_forward_does_not(
    models: tuple[Any, Any], spoil: Callable[[Any], object], caught: str
) -> None:
    failed = failing(models, spoil)
    assert caught in failed
    assert "logits" not in failed


@pytest.mark.parametrize(
    ("part", "scale"), [("model.norm", 1.001), ("model.layers.0.mlp.down_proj", 1.001), ("lm_head", 0.999)]
)
def test_a_weight_that_is_off_by_a_thousandth_is_seen(models: tuple[Any, Any], part: str, scale: float) -> None:
    def spoil(model: Any) -> None:
        model.get_submodule(part).weight.data.mul_(scale)

    assert {"logits", "logits KL", "cache"} <= failing(models, spoil)
