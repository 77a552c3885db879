"""Sequential readers: nearer to the source than readers fitted to the source's activations, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.calibration.data import DataOptions, token_batches, tokenizer_of
from anysize.calibration.scores import Scores
from anysize.errors import InputError, SizeError
from anysize.executor import target_tensors
from anysize.io.models import build_model
from anysize.io.reader import Checkpoint
from anysize.proof.algebra import check_rows, rows_of
from anysize.proof.parity import load
from anysize.recipe import Plan
from tests import tiny
from tests.conftest import _tokenizer_files
from tests.shrink.test_families import request

HALF = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def divergence(plan: Plan, source: Path, text: Path) -> float:
    """KL(source || target) in nats a token on the text that was fitted to."""
    batches = token_batches(str(text), tokenizer_of(str(source)), 61, DataOptions(sequence_length=64, tokens=4096))
    made = build_model(plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(source)), torch.float32)
    model, total, count = load(source, plan.model_class), 0.0, 0
    with torch.no_grad():
        for batch in batches:
            p, q = (m(**batch).logits.log_softmax(-1) for m in (model, made))
            total += float((p.exp() * (p - q)).sum(-1).mean())
            count += 1
    return total / count


@pytest.mark.parametrize("sizes", [{"hidden_size": 16}, {"intermediate_size": 24}, HALF], ids=["hidden", "ffn", "all"])
def test_following_the_target_comes_nearer_to_the_source(
    llama: Path, text: Path, scores: Scores, sizes: dict[str, Any]
) -> None:
    found = {
        readers: divergence(anysize.plan(llama, calibration=scores, readers=readers, **sizes), llama, text)
        for readers in ("least-squares", "sequential")
    }
    assert found["sequential"] < found["least-squares"]


def test_a_tied_gain_is_refitted(tied_llama: Path, text: Path, tied_scores: Scores) -> None:
    plans = {
        r: anysize.plan(tied_llama, calibration=tied_scores, readers=r, hidden_size=16)
        for r in ("least-squares", "sequential")
    }
    found = {readers: divergence(plan, tied_llama, text) for readers, plan in plans.items()}
    assert found["sequential"] < found["least-squares"]
    name = "model.norm.weight:value"
    assert (plans["sequential"].dense[name] != plans["least-squares"].dense[name]).any()


def test_a_head_after_a_norm_without_a_gain_is_refitted(text: Path, tmp_path: Path) -> None:
    source = tmp_path / "olmo"
    variant = next(v for v in tiny.VARIANTS if v.family == "olmo" and not v.tied)
    tiny.model(variant, dtype=torch.float32).save_pretrained(source)
    _tokenizer_files(source, tiny.VOCAB)
    scores = anysize.calibrate(source, text, tokens=4096, sequence_length=32)
    width = request(variant)["hidden_size"]
    found = {
        readers: anysize.plan(source, hidden_size=width, calibration=scores, readers=readers).dense["model.norm:read"]
        for readers in ("least-squares", "sequential")
    }
    assert abs(found["sequential"] - found["least-squares"]).max() > 1e-3


def test_the_layer_before_a_gap_takes_over_what_was_dropped(llama: Path, text: Path, scores: Scores) -> None:
    sizes = {"hidden_size": 28, "num_hidden_layers": 1, "layers": "0"}
    found = [
        divergence(anysize.plan(llama, calibration=scores, readers=readers, **sizes), llama, text)
        for readers in ("sequential", "least-squares")
    ]
    assert found[0] < 0.9 * found[1]


def test_what_was_fitted_is_what_is_written(llama: Path, scores: Scores) -> None:
    plan = anysize.plan(llama, calibration=scores, **HALF)
    assert plan.options.readers == "sequential"
    source = Checkpoint(llama)
    made = target_tensors(plan, source)
    down = "model.layers.1.mlp.down_proj.weight"
    assert made[down].equal(torch.from_numpy(plan.dense[f"{down}:value"]))
    from anysize.io.models import NamedTensors

    assert check_rows(plan, rows_of(source), rows_of(NamedTensors(plan.target_config, made))).passed


def test_where_it_cannot_be_the_default_says_so_and_a_wish_is_refused(llama: Path, scores: Scores) -> None:
    mixed = {"hidden_size": 16, "intermediate_size": 64}
    plan = anysize.plan(llama, calibration=scores, **mixed)
    assert plan.options.readers == "least-squares"
    assert "readers are least-squares, not sequential: an axis grows" in plan.notes
    with pytest.raises(SizeError, match="but an axis grows: use least-squares"):
        anysize.plan(llama, calibration=scores, readers="sequential", **mixed)
    with pytest.raises(SizeError, match="layers are repeated or out of order"):
        anysize.plan(llama, calibration=scores, readers="sequential", hidden_size=16, layers="1,0")


def test_where_the_data_are_gone_the_default_says_so_and_a_wish_is_refused(
    llama: Path, scores: Scores, tmp_path: Path
) -> None:
    from dataclasses import replace

    gone = replace(scores, record=scores.record.model_copy(update={"data": str(tmp_path / "gone.txt")}))
    with pytest.raises(InputError, match=r"gone\.txt' do not exist: put them there, or use least-squares"):
        anysize.plan(llama, calibration=gone, readers="sequential", hidden_size=16)
    plan = anysize.plan(llama, calibration=gone, hidden_size=16)
    assert plan.options.readers == "least-squares"
    told = f"they read the data of the scores again, and '{tmp_path}/gone.txt' do not exist"
    assert f"readers are least-squares, not sequential: {told}" in plan.notes


def test_a_fitted_model_that_was_changed_since_is_told(llama: Path, scores: Scores, tmp_path: Path) -> None:
    made = Path(str(anysize.resize(llama, tmp_path / "out", calibration=scores, hidden_size=16, verify="off")))
    proof = anysize.verify(llama, made, full=False)
    assert proof.passed
    place = made / "model.safetensors"
    tensors = load_file(place)
    assert next(check for check in proof.checks if check.name == "written").control == len(tensors)
    tensors["model.layers.1.mlp.down_proj.weight"][-1, 0] += 1e-3
    save_file(tensors, place, metadata={"format": "pt"})
    proof = anysize.verify(llama, made, full=False)
    assert [check.measured for check in proof.checks if not check.passed and check.required] == [1]
    # As an earlier version has left it.
    record = json.loads((made / "anysize.json").read_text())
    del record["rows"]
    (made / "anysize.json").write_text(json.dumps(record))
    assert any("rows are not checked" in note for note in anysize.verify(llama, made, full=False).notes)


FAMILIES = [
    v
    for v in tiny.VARIANTS
    if str(v)
    in (
        "gpt2-untied",
        "gpt_neox-untied",
        "opt-untied",
        "qwen3-GQA-tied",
        "phi3-GQA-tied",
        "olmo-GQA-untied",
        "gemma-GQA-tied",
    )
]


def written(variant: tiny.Variant, llama: Path, folder: Path) -> int:
    """Write a model of a family that speaks as the llama does; return a length that it reads."""
    from anysize.io.models import new_model
    from anysize.proof.miniature import random_weights

    raw = {**tiny.config(variant), "vocab_size": 61}
    model = new_model(raw["architectures"][0], raw, torch.float32)
    random_weights(model, 0)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama / name).read_bytes())
    return 16 if getattr(model.config, "max_position_embeddings", 64) < 64 else 64


@pytest.mark.parametrize("readers", ["least-squares", "measured", "sequential"])
def test_a_tied_head_whose_embedding_is_multiplied_is_fitted_as_it_speaks(
    llama: Path, text: Path, tmp_path: Path, readers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemma = next(v for v in tiny.VARIANTS if str(v) == "gemma-GQA-tied")
    written(gemma, llama, tmp_path)
    scores = anysize.calibrate(tmp_path, text, sequence_length=64)
    batches = list(token_batches(str(text), tokenizer_of(str(llama)), 61, DataOptions(4096, 64, 8)))
    found: list[float] = []
    for _ in range(2):
        plan = anysize.plan(tmp_path, calibration=scores, select="activation", readers=readers, hidden_size=16)
        made = build_model(
            plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(tmp_path)), torch.float32
        )
        model = load(tmp_path, plan.model_class)
        with torch.no_grad():
            pairs = [(model(**batch).logits, made(**batch).logits) for batch in batches]
        wanted, got = (torch.cat([p - p.mean(-1, keepdim=True) for p in side]) for side in zip(*pairs, strict=True))
        # What the target's logits would best be multiplied by: nothing, where they were fitted.
        found.append(float((wanted * got).sum() / got.square().sum()))
        # As if it were a llama.
        monkeypatch.setattr("anysize.fit.Fit.embedding_scale", 1.0)
    assert found[0] == pytest.approx(1, abs=0.02)
    assert found[1] < 0.9


@pytest.mark.parametrize("variant", FAMILIES, ids=str)
def test_other_families_are_followed_as_well(variant: tiny.Variant, llama: Path, text: Path, tmp_path: Path) -> None:
    """Parallel branches, biases, transposed and fused matrices: no family gets farther from its source."""
    length = written(variant, llama, tmp_path)
    scores = anysize.calibrate(tmp_path, text, sequence_length=length)
    batches = list(token_batches(str(text), tokenizer_of(str(llama)), 61, DataOptions(2048, length, 8)))
    found: list[float] = []
    for readers in ("sequential", "least-squares"):
        plan = anysize.plan(tmp_path, calibration=scores, readers=readers, intermediate_size=13)
        made = build_model(
            plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(tmp_path)), torch.float32
        )
        model = load(tmp_path, plan.model_class)
        with torch.no_grad():
            found.append(sum(float((model(**b).logits - made(**b).logits).square().mean()) for b in batches))
    # Where little was lost, the ridge may cost as much as following gains.
    assert found[0] < 1.05 * found[1]


def test_a_head_that_was_tied_is_measured_by_the_embedding(tied_llama: Path, tied_scores: Scores) -> None:
    plan = anysize.plan(
        tied_llama, calibration=tied_scores, select="activation", readers="measured", untie=True, hidden_size=16
    )
    made = {recipe.name: recipe for recipe in plan.recipes}
    assert made["lm_head.weight"].source == made["model.embed_tokens.weight"].source
    assert made["lm_head.weight"].factor != made["model.embed_tokens.weight"].factor


def test_what_is_not_fitted_though_readers_are_is_told(llama: Path, scores: Scores) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 1}
    told = anysize.plan(llama, calibration=scores, readers="least-squares", **sizes).notes
    assert any("what reads heads is read as it was, not fitted" in note for note in told)
    fewer = anysize.plan(
        llama, calibration=scores, readers="least-squares", num_key_value_heads=1, num_attention_heads=2
    )
    assert not any("read as it was" in note for note in fewer.notes)
