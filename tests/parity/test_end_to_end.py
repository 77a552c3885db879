"""A folder in, a folder out, for every family: streamed, proved in full, loaded with stock transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

import anysize
from anysize.api import apply_with_proof
from anysize.config import understand
from anysize.errors import CheckpointError, SizeError
from anysize.io.models import quiet_transformers
from anysize.proof import parity
from anysize.target import public_sizes

_MAIN = ("GQA-tied", "tied", "bias", "350m", "projected")
VARIANTS = [v for v in tiny.VARIANTS if v.name in _MAIN and not (v.family == "olmo" and v.tied)]
VARIANTS += [v for v in tiny.VARIANTS if str(v) == "olmo-GQA-untied" or str(v) == "olmo-MHA-untied"]


def saved(variant: tiny.Variant, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    with quiet_transformers():
        tiny.model(variant, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_resized_folder_passes_every_proof(variant: tiny.Variant, tmp_path: Path) -> None:
    source = saved(variant, tmp_path / "source")
    plan = anysize.plan(source, scale=2, preset="split")
    output, proof = apply_with_proof(plan, tmp_path / "out", verify="full")
    assert proof.passed, proof.failures
    names = {check.name for check in proof.checks}
    assert {"miniature", "permute hidden", "permute ffn", "coverage", "algebra", "logits", "reload"} <= names
    assert all(c.control is not None for c in proof.checks if c.name not in ("bfloat16", "greedy"))
    assert anysize.verify(source, output).passed


@pytest.mark.parametrize("family", ["gpt2", "opt", "vit"])
def test_wider_heads_pass_every_proof(family: str, tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == family and v.name in ("tied", "bias"))
    source = saved(variant, tmp_path / "source")
    for preset in ("fresh", "hypercloning"):
        plan = anysize.plan(source, hidden_size=48, head_dim=16, num_attention_heads=3, preset=preset)
        _, proof = apply_with_proof(plan, tmp_path / preset, verify="full")
        assert proof.passed, proof.failures


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_folders_stay_half_and_pass(dtype: torch.dtype, tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "llama-GQA-tied")
    source = saved(variant, tmp_path / "source", dtype)
    plan = anysize.plan(source, hidden_size=36, num_hidden_layers=3)
    output, proof = apply_with_proof(plan, tmp_path / "out", verify="full")
    assert proof.passed, proof.failures
    assert {recipe.dtype for recipe in plan.recipes} == {"BF16" if dtype == torch.bfloat16 else "F16"}
    assert output.is_dir()


@pytest.mark.parametrize("wrong", [False, True])
def test_what_single_precision_does_to_the_source_is_allowed_and_no_more(
    wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if this model lost more digits than the figure that is enough for most.
    monkeypatch.setitem(parity.TOLERANCE, torch.float32, 1e-9)
    source = saved(next(v for v in tiny.VARIANTS if str(v) == "llama-GQA-tied"), tmp_path / "source")
    output = anysize.apply(anysize.plan(source, scale=1.5), tmp_path / "out", verify="off")
    models = [parity.load(place, "LlamaForCausalLM") for place in (source, Path(str(output)))]
    if wrong:
        with torch.no_grad():
            models[1].get_parameter("model.norm.weight")[0] *= 1.001
    comparison = parity.Comparison(*models, torch.float32)
    before = {name: weight.clone() for name, weight in models[0].state_dict().items()}
    logits = next(check for check in comparison.run(full=False).checks if check.name == "logits")
    assert 1e-9 < logits.tolerance < 1e-5
    assert logits.passed is not wrong
    assert all(weight.equal(before[name]) for name, weight in models[0].state_dict().items())


@pytest.mark.parametrize("preset", ["hypercloning", "split"])
def test_doubling_in_bfloat16_is_exact_bit_by_bit_after_folding_back(preset: str, tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "llama-GQA-untied")
    source = saved(variant, tmp_path / "source", torch.bfloat16)
    plan = anysize.plan(source, hidden_size=48, intermediate_size=58, preset=preset)
    _, proof = apply_with_proof(plan, tmp_path / "out", verify="off")
    algebra = next(check for check in proof.checks if check.name == "algebra")
    assert algebra.measured == 0.0


def test_a_loaded_model_is_resized_in_memory() -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "gemma2-GQA-tied")
    model = tiny.model(variant, dtype=torch.float32)
    grown = anysize.resize(model, hidden_size=48)
    assert type(grown) is type(model)
    given = tiny.inputs(variant)
    with torch.no_grad():
        wanted, got = model(**given).logits, grown(**given).logits
    assert (wanted - got).abs().max() / wanted.std() <= 1e-5
    assert grown.config.hidden_size == 48


def test_a_loaded_image_model_which_generates_nothing_is_written(tmp_path: Path) -> None:
    model = tiny.model(next(v for v in tiny.VARIANTS if v.family == "vit"), dtype=torch.float32)
    made = anysize.resize(model, tmp_path / "out", intermediate_size=61, verify="off")
    assert isinstance(made, Path)
    assert not (made / "generation_config.json").exists()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_scale_chooses_a_legal_config_near_the_ratio(variant: tiny.Variant, tmp_path: Path) -> None:
    source = saved(variant, tmp_path / "source")
    before = public_sizes(understand(tiny.config(variant)))
    try:
        plan = anysize.plan(source, scale=1.7)
    except SizeError:
        # These two grow by whole copies only: norms on the stream itself, and norms over all heads.
        assert variant.name == "350m" or variant.family in ("olmo2", "olmoe")
        return
    after = public_sizes(understand(plan.target_config))
    assert 1.3 <= after["hidden_size"] / before["hidden_size"] <= 2.1
    assert after["num_hidden_layers"] == before["num_hidden_layers"]
    assert after["head_dim"] == before["head_dim"]


def of_family(name: str, folder: Path) -> Path:
    return saved(next(v for v in tiny.VARIANTS if str(v) == name), folder)


def test_a_dropped_mask_of_a_type_of_its_own_is_no_part_of_the_proof(tmp_path: Path) -> None:
    source = of_family("gpt2-untied", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    mask = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for layer in range(2)}
    save_file({**tensors, **mask}, source / "model.safetensors", {"format": "pt"})
    output, proof = apply_with_proof(anysize.plan(source, scale=2), tmp_path / "out")
    assert proof.passed
    assert anysize.verify(source, output).passed


def test_settings_of_generation_do_not_fail_an_exact_growth(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    settings = {"bos_token_id": 0, "eos_token_id": [1, 5, 7], "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    (source / "generation_config.json").write_text(json.dumps(settings))
    _, proof = apply_with_proof(anysize.plan(source, intermediate_size=96), tmp_path / "out", verify="full")
    assert {check.name: check.measured for check in proof.checks}["greedy"] == 0


def test_models_that_do_not_fit_are_compared_from_disk_each_with_its_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anysize.proof.whole.fits_in_memory", lambda _: False)
    source = of_family("mixtral-GQA-untied", tmp_path / "source")
    # Experts keep their shapes, so that those of one model could stand in for the other's.
    plan = anysize.plan(source, num_attention_heads=16, num_key_value_heads=4)
    output, proof = apply_with_proof(plan, tmp_path / "out", verify="full")
    assert [check.passed for check in proof.checks if check.name == "logits"] == [True]
    assert anysize.verify(source, output).passed
    weights = load_file(output / "model.safetensors")
    spoiled = next(name for name in weights if "experts.1.w1" in name)
    weights[spoiled] += 0.5
    save_file(weights, output / "model.safetensors", {"format": "pt"})
    assert "logits" in {check.name for check in anysize.verify(source, output).checks if not check.passed}


def test_two_layouts_in_one_folder_are_refused(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    new_llama(tmp_path / "source", shards=2)
    new_llama(tmp_path / "source", seed=1)
    with pytest.raises(CheckpointError, match=r"holds both model\.safetensors and model\.safetensors\.index\.json"):
        anysize.plan(tmp_path / "source", intermediate_size=96)
