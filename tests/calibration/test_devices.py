"""Where a source runs: on the accelerator where it has room, else on the CPU, and where it was told to, or nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import anysize
from anysize.calibration.scores import Scores
from anysize.config import understand
from anysize.errors import InputError
from anysize.io.reader import Checkpoint
from anysize.proof.parity import load
from anysize.tensors import num_parameters


@pytest.mark.parametrize(
    ("options", "why"),
    [({"device": "nonsense"}, "cannot be used"), ({"device": "nonsense", "low_memory": True}, "cannot be used"),
     ({"device": "meta", "low_memory": True}, "leave the device 'meta' out")],
)  # fmt: skip
def test_a_device_that_would_do_nothing_is_refused(llama: Path, text: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        anysize.calibrate(llama, text, sequence_length=64, tokens=64, **options)
    model = load(llama, "LlamaForCausalLM")
    with pytest.raises(InputError, match="the model is loaded already, on 'cpu'"):
        anysize.calibrate(model, text, sequence_length=64, tokens=64, tokenizer=str(llama), device="meta")


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where models were moved to, on a machine with a CUDA device: in name only."""
    places: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: (places.append(str(device)), model)[1])
    return places


WAYS: dict[str, dict[str, Any]] = {"plain": {}, "leave one out": {"leave_one_out": True}, "evolution": {}}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_without_room_on_the_accelerator_runs_on_the_cpu(
    way: str, llama: Path, text: Path, scores: Scores, tmp_path: Path, moved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path))
    weights = 4 * num_parameters(understand(Checkpoint(llama).config))
    # Weights alone are not enough: a batch has to be run.
    for free in (weights, weights + (1 << 30)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device, free=free: (free, 1 << 40))
        if way == "evolution":
            anysize.plan(llama, num_hidden_layers=1, layers="evolutionary", readers="none", calibration=scores)
        else:
            found = anysize.calibrate(llama, text, sequence_length=64, **WAYS[way])
            name = "model.layers.1.mlp.down_proj:in"
            assert found.of(name, "abs").allclose(scores.of(name, "abs"))
    assert moved == ["cpu", "cuda:0"]


def test_a_device_that_is_named_and_has_no_room_is_refused(
    llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_model: PreTrainedModel, _device: torch.device) -> PreTrainedModel:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(InputError, match="GB in single precision, more than is free on 'meta': free some, or leave"):
        anysize.calibrate(llama, text, sequence_length=64, tokens=64, device="meta")
