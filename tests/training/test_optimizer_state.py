"""The state of AdamW through a plan: what is carried is what the target's own gradients would have made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import anysize
from anysize.errors import InputError
from anysize.executor import DimMaps
from anysize.training.arguments import fixed_arguments, training_arguments, with_defaults
from anysize.training.config import train_config
from anysize.training.groups import new_elements
from anysize.training.optimizer_state import (
    FILE,
    carried,
    carried_state,
    load_state,
    require_kept,
    save_state,
    set_state,
)
from anysize.training.run import train
from anysize.training.start import load
from tests.conftest import make_llama

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4}


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12) % 50
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("preset", ["hypercloning", "fresh"])
def test_what_is_carried_of_a_gradient_is_the_gradient_of_the_target(llama: Path, preset: str) -> None:
    plan = anysize.plan(llama, preset=preset, **SIZES)
    before = _gradients(load(str(llama), torch.float32))
    target = anysize.apply(plan, verify="off")
    after = _gradients(target)
    maps = DimMaps(plan.axes, plan.dense)
    new = new_elements(plan, target) if preset == "fresh" else {}
    for recipe in plan.recipes:
        found = carried(recipe, maps, before[recipe.source], 1)
        old = ~new.get(recipe.name, torch.zeros(recipe.shape, dtype=torch.bool))
        wanted = after[recipe.name]
        scale = float(before[recipe.source].abs().max())
        assert float((found - wanted)[old].abs().max()) < 1e-4 * scale, recipe.name
        assert not bool(found[~old].any()), recipe.name
        # Without the division, it would be another one.
        plain = recipe.model_copy(update={"factor": recipe.factor * 3})
        assert float((carried(plain, maps, before[recipe.source], 1) - wanted)[old].abs().max()) > 1e-2 * float(
            wanted[old].abs().max()
        )
        squared = carried(recipe, maps, before[recipe.source].square(), 2)
        assert torch.allclose(squared[old], found[old].square(), rtol=1e-4, atol=1e-20), recipe.name


def test_copies_with_unequal_shares_get_the_mean_of_theirs(llama: Path) -> None:
    plan = anysize.plan(llama, preset="split", hidden_size=64)
    name = "model.embed_tokens.weight"
    recipe = next(recipe for recipe in plan.recipes if recipe.name == name)
    before = _gradients(load(str(llama), torch.float32))[name]
    after = _gradients(anysize.apply(plan, verify="off"))[name]
    found = carried(recipe, DimMaps(plan.axes, plan.dense), before, 1)
    mean = (after[:, :32] + after[:, 32:]) / 2
    assert not torch.allclose(after[:, :32], after[:, 32:], rtol=0.1)
    for half in (found[:, :32], found[:, 32:]):
        assert torch.allclose(half, mean, atol=1e-5 * float(before.abs().max()))


def _with_state(folder: Path) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = load(str(folder), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        _gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_a_state_in_shards_that_a_launcher_asks_for_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    args = training_arguments({**with_defaults({"max_steps": 1}), **fixed_arguments(str(tmp_path))}, "c.yaml")
    require_kept(args)
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(InputError, match="needs whole tensors"):
        require_kept(args)


def test_a_state_is_kept_and_found_again(llama: Path, tmp_path: Path) -> None:
    model, optimizer = _with_state(llama)
    save_state(model, optimizer, tmp_path)  # type: ignore[arg-type]
    found, steps = load_state(tmp_path / FILE)
    assert steps == 3
    parameters = dict(model.named_parameters())
    assert found.keys() == parameters.keys()
    for name, moments in found.items():
        for moment, value in moments.items():
            assert torch.equal(value, optimizer.state[parameters[name]][moment])


def test_a_target_goes_on_with_it(llama: Path, tmp_path: Path) -> None:
    model, optimizer = _with_state(llama)
    save_state(model, optimizer, tmp_path)  # type: ignore[arg-type]
    plan = anysize.plan(llama, preset="fresh", num_hidden_layers=3, **SIZES)
    target = anysize.apply(plan, verify="off")
    state, steps = carried_state(plan, tmp_path / FILE, target)
    fused = torch.optim.AdamW(target.parameters(), lr=1e-3, fused=True)
    set_state(fused, target, state, steps)
    # The layer that starts as an identity has no past.
    silent = next(number for number, step in enumerate(plan.layers) if step.silent)
    copied = next(number for number, step in enumerate(plan.layers) if not step.silent)
    for layer, has_past in ((silent, False), (copied, True)):
        assert bool(state[f"model.layers.{layer}.mlp.up_proj.weight"]["exp_avg"].any()) is has_past
    _gradients(target)
    fused.step()
    assert {int(known["step"]) for known in fused.state.values()} == {4}


def test_what_does_not_fit_is_refused(llama: Path, tmp_path: Path) -> None:
    cut = anysize.plan(llama, intermediate_size=24, preset="weight-selection")
    with pytest.raises(InputError, match="this target does not: "):
        carried_state(cut, tmp_path / FILE, anysize.apply(cut, verify="off"))
    tied = make_llama(tmp_path / "tied", tie_word_embeddings=True)
    parted = anysize.plan(tied, intermediate_size=96, untie=True)
    with pytest.raises(InputError, match="untie parts them"):
        carried_state(parted, tmp_path / FILE, anysize.apply(parted, verify="off"))
    model = load(str(llama), torch.float32)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    _gradients(model)
    plain.step()
    with pytest.raises(InputError, match="only the state of AdamW"):
        save_state(model, plain, tmp_path)
    assert not (tmp_path / FILE).exists()


def test_a_run_keeps_it_and_the_next_one_carries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = make_llama(tmp_path / "source")
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{3 + 7 * i % 58}" for i in range(2000)))
    common = {"data": {"train": str(data), "sequence_length": 16, "max_tokens": 2000}}
    training = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no", "learning_rate": 1e-3}

    def run(raw: dict[str, object]) -> dict[str, object]:
        config = train_config({**common, "training": training} | raw, "c.yaml")
        return train(config, command="c", origin="c.yaml", progress=lambda *_: None)

    run({"output": "older", "model": str(source), "keep_optimizer": True})
    grown = {"resize": {"source": "older", "intermediate_size": 96, "preset": "fresh"}}
    carried_run = run({"output": "a", **grown, "recipe": {"optimizer_state": "carried"}})
    plain_run = run({"output": "b", **grown})
    assert carried_run["steps"] == plain_run["steps"] == 4
    weights = [load(name, torch.float32).state_dict() for name in ("a", "b")]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    asked = {"recipe": {"optimizer_state": "carried"}}
    for more, told in (
        ({"model": "older", **asked}, "only a start that a plan makes"),
        ({**asked, "resize": {**grown["resize"], "source": str(source)}}, "has no optimizer/adamw.safetensors"),
        ({**grown, **asked, "training": {**training, "adam_beta2": 0.999}}, "give recipe.new_parameters.warmup_steps"),
        ({"model": "older", "keep_optimizer": True, "training": {**training, "optim": "adafactor"}}, "only the state"),
    ):
        with pytest.raises(InputError, match=told):
            run({"output": "c", **more})
        assert not Path("c").exists()
