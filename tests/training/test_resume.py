"""Stopped runs of every way a model may lie on disk go on with all of their weights, and see data in whole steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anysize.errors import CheckpointError, InputError
from anysize.progress import quiet
from anysize.training.config import train_config
from anysize.training.run import train
from tests import image_files, tiny
from tests.conftest import _tokenizer_files
from tests.training.runs import config_of, record

Weights = Callable[[Path], dict[str, torch.Tensor]]
# Whose tensors have other names on disk than in memory, or are others there, and one whose are the same.
FAMILIES = ("mixtral", "olmoe", "qwen3_moe", "gpt_neox", "vit", "llama")


def asked_of(family: str, folder: Path, output: Path, **training: Any) -> dict[str, Any]:
    """A run of 8 steps with a checkpoint after 4, of a tiny model of a family and data of its kind."""
    variant = next(v for v in tiny.VARIANTS if v.family == family and not v.tied)
    source = folder / family
    tiny.model(variant, dtype=torch.float32).save_pretrained(source)
    if family == "vit":
        image_files.prepared(source, {"size": 12})
        labels = [number % 7 for number in range(22)]
        data = {"train": str(image_files.table(folder / "images.parquet", 22, label=labels)), "evaluation_tokens": 8}
        data["validation"] = data["train"]
    else:
        _tokenizer_files(source, tiny.VOCAB)
        text = folder / "text.txt"
        text.write_text(" ".join(f"w{3 + number * number % (tiny.VOCAB - 3)}" for number in range(22 * 16)))
        data = {"train": str(text), "validation": str(text), "sequence_length": 16}
    training = {"max_steps": 8, "save_steps": 4, **training}
    return {**config_of(source, folder, output, training=training), "data": data}


def run(config: dict[str, Any]) -> None:
    train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)


def stopped(output: Path) -> None:
    """Leave a run as a kill after its fourth step does."""
    (output / "anysize-train.json").write_text(json.dumps({**record(output), "finished": False}))
    shutil.rmtree(output / "checkpoint-8")
    (output / "model.safetensors").unlink()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_run_goes_on_with_all_of_its_weights(family: str, tmp_path: Path, weights_of: Weights) -> None:
    output = tmp_path / "out"
    config = asked_of(family, tmp_path, output)
    run(config)
    told, weights = record(output), weights_of(output)
    stopped(output)
    run(config)
    assert record(output)["losses"] == told["losses"]
    again = weights_of(output)
    assert again.keys() == weights.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_checkpoint_without_some_weights_is_refused(tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = asked_of("mixtral", tmp_path, output)
    run(config)
    stopped(output)
    place = output / "checkpoint-4" / "model.safetensors"
    tensors = load_file(place)
    lost = next(name for name in tensors if "experts.1." in name)
    del tensors[lost]
    save_file(tensors, place, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing tensors: {lost}"):
        run(config)
    assert (output / "checkpoint-4").is_dir()


def test_a_damaged_checkpoint_is_one_sentence_and_its_fix_works(tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = asked_of("llama", tmp_path, output)
    run(config)
    told = record(output)
    stopped(output)
    place = output / "checkpoint-4"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors", "trainer_state.json"):
        file = place / name
        whole = file.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"[1]"):
            file.write_bytes(damaged)
            if name == "trainer_state.json":
                # Written last: what has none is left of a killed process.
                run(config)
                assert record(output)["losses"] == told["losses"]
                stopped(output)
                continue
            with pytest.raises(
                CheckpointError, match=rf"^cannot go on from the checkpoint '{place}': .*; remove it, and"
            ):
                run(config)
        file.write_bytes(whole)
    shutil.rmtree(place)
    run(config)
    assert record(output)["losses"] == told["losses"]


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_the_best_checkpoint_is_taken_whole(family: str, tmp_path: Path, weights_of: Weights) -> None:
    output = tmp_path / "out"
    # At this rate what follows the first checkpoint is worse.
    config = asked_of(family, tmp_path, output, load_best_model_at_end=True, learning_rate=0.3, warmup_steps=0)
    run(config)
    curve = record(output)["curve"]
    assert curve["4"]["validation"] != curve["8"]["validation"]
    best = min(("4", "8"), key=lambda step: curve[step]["validation"])
    of = {step: weights_of(output / f"checkpoint-{step}") for step in ("4", "8")}
    saved = weights_of(output)
    assert all(torch.equal(saved[name], of[best][name]) for name in saved)
    assert not all(torch.equal(of["4"][name], of["8"][name]) for name in saved)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Return the numbers of the sequences that each batch of a run will have held."""
    from anysize.training.trainer import AnysizeTrainer

    seen: list[list[int]] = []
    loss = AnysizeTrainer.compute_loss

    def counted(trainer: Any, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> Any:
        if model.training:
            seen.append(inputs["sequence"].tolist())
        return loss(trainer, model, inputs, *more, **named)

    monkeypatch.setattr(AnysizeTrainer, "compute_loss", counted)
    return seen


@pytest.mark.parametrize("accumulated", [1, 2])
def test_every_step_sees_as_much(accumulated: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    # 22 sequences: five batches of four, or two steps of two batches each, and the rest is left for another epoch.
    config = asked_of("llama", tmp_path, tmp_path / "out", gradient_accumulation_steps=accumulated, max_steps=11)
    run(config)
    assert [len(batch) for batch in seen] == [4] * 11 * accumulated
    assert record(tmp_path / "out")["tokens"] == 11 * 4 * 16 * accumulated
    epoch = 20 // (4 * accumulated) * accumulated
    epochs = [{number for batch in seen[at : at + epoch] for number in batch} for at in (0, epoch)]
    assert [len(found) for found in epochs] == [4 * epoch] * 2
    assert epochs[0] != epochs[1]


def test_a_last_step_in_parts_would_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Trainer

    from anysize.training.trainer import AnysizeTrainer

    monkeypatch.setattr(AnysizeTrainer, "_get_train_sampler", Trainer._get_train_sampler)
    with pytest.raises(AssertionError):
        test_every_step_sees_as_much(1, tmp_path, monkeypatch)


def test_sequences_come_in_their_order_where_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = recorded(monkeypatch)
    run(asked_of("llama", tmp_path, tmp_path / "out", train_sampling_strategy="sequential", max_steps=7))
    assert [number for batch in seen for number in batch] == [*range(20), *range(8)]
    with pytest.raises(InputError, match="'group_by_length' is for examples of different lengths"):
        run(asked_of("llama", tmp_path, tmp_path / "other", train_sampling_strategy="group_by_length"))
    assert not (tmp_path / "other").exists()
