"""Fits on an accelerator: everything is where it is used, and what is kept comes back to the CPU.

Without one: torch's fake tensors have shapes and places and no values, and refuse whatever mixes two places.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import anysize
import anysize.sequential
from anysize.calibration import replay
from anysize.calibration.scores import Scores
from anysize.dense import Fitted
from anysize.devices import chosen_device, device_for_algebra, device_with
from anysize.directions import directions
from anysize.fit import least_squares
from anysize.io.reader import Checkpoint

HALF = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
# Of the kinds of devices that torch knows, one that no build leaves out, so that places can be told apart by it.
AWAY = torch.device("lazy:0")


def for_real(made: Callable[..., Any]) -> Callable[..., Any]:
    def inside(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return made(*args, **kwargs)

    return inside


def followed_away(source: Path, scores: Scores, patch: pytest.MonkeyPatch) -> dict[str, torch.device]:
    """Return where what is fitted lies, by name, of a plan whose target is followed on the accelerator."""
    refit, batches_of = anysize.sequential.refit, anysize.sequential.batches_of
    places, streams = dict[str, torch.device](), list[torch.device]()

    def store(made: Fitted, name: str, values: Any) -> str:
        places[name] = values.device
        made.dense[name] = np.zeros(tuple(values.shape), np.float32)
        return name

    def away(*args: Any) -> Fitted:
        with pytest.MonkeyPatch.context() as inner, FakeTensorMode(allow_non_fake_inputs=True):
            inner.setattr(replay, "empty_model", for_real(replay.empty_model))
            inner.setattr(Checkpoint, "read", for_real(Checkpoint.read))
            inner.setattr("anysize.sequential.target_tensor", for_real(anysize.sequential.target_tensor))
            inner.setattr("anysize.sequential.batches_of", for_real(lambda *asked: list(batches_of(*asked))))
            inner.setattr(FakeTensor, "numpy", lambda values: values, raising=False)
            inner.setattr(Fitted, "store", store)
            # There are no values to compare: of two batches here, what has one shape is the same.
            inner.setattr(torch, "equal", lambda one, other: one.shape == other.shape)
            replayed = replay.Layers.replay

            def remember(layers: replay.Layers, layer: int, batch: int) -> torch.Tensor:
                found = replayed(layers, layer, batch)
                assert isinstance(found, FakeTensor)
                streams.append(found.device)
                return found

            inner.setattr(replay.Layers, "replay", remember)
            return refit(*args)

    patch.setattr("anysize.sequential.refit", away)
    patch.setattr("anysize.sequential.device_with", lambda _bytes: AWAY)
    anysize.plan(source, calibration=scores, **HALF)
    assert set(streams) == {AWAY}
    return places


@pytest.mark.parametrize("tied", [False, True])
def test_targets_are_followed_on_the_accelerator(
    request: pytest.FixtureRequest, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Path = request.getfixturevalue("tied_llama" if tied else "llama")
    scores: Scores = request.getfixturevalue("tied_scores" if tied else "scores")
    places = followed_away(source, scores, monkeypatch)
    assert "model.layers.1.mlp.down_proj.weight:value" in places
    assert ("model.norm.weight:value" in places) == tied
    assert {place.type for place in places.values()} == {"cpu"}


def test_what_lies_elsewhere_is_noticed(llama: Path, scores: Scores, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: weights of layers that stay on the CPU."""
    holding = replay.Layers.holding

    def here(layers: replay.Layers, tensors: Any) -> Any:
        layers.device = torch.device("cpu")
        return holding(layers, tensors)

    monkeypatch.setattr(replay.Layers, "layer", lambda layers, _layer: here(layers, layers.expected.values()))
    with pytest.raises(RuntimeError, match="same device"):
        followed_away(llama, scores, monkeypatch)


def test_matrices_are_solved_on_the_accelerator_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.devices.device_with", lambda _bytes: AWAY)
    solved: list[torch.device] = []
    for name in ("solve", "eigh"):
        made = getattr(torch.linalg, name)
        monkeypatch.setattr(
            torch.linalg, name, lambda *given, made=made: (solved.append(given[0].device), made(*given))[1]
        )
    with FakeTensorMode() as fake:
        moments = fake.from_tensor(torch.eye(6, dtype=torch.float64))
        found = least_squares(moments[:4], moments)
        assert (solved, found.device.type, found.shape) == ([AWAY], "cpu", (4, 6))
        kept = directions(moments, 4, centred=False)
        assert (solved[1:], kept.device.type, kept.shape) == ([AWAY], "cpu", (4, 6))


def test_without_room_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.devices.chosen_device", lambda _wanted: AWAY)
    for name, value in (("mem_get_info", (199, 1 << 40)), ("memory_reserved", 0), ("memory_allocated", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert device_with(100).type == "cpu"
    assert device_with(99) == AWAY
    # What is known needs no room to spare.
    assert device_with(49, known=101) == AWAY
    assert device_with(49, known=102).type == "cpu"


def test_what_torch_holds_and_no_tensor_does_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.devices.chosen_device", lambda _wanted: AWAY)
    for name, value in (("mem_get_info", (40, 1 << 40)), ("memory_reserved", 300), ("memory_allocated", 140)):
        monkeypatch.setattr(torch.cuda, name, lambda _device, value=value: value)
    assert device_with(100) == AWAY
    assert device_with(101).type == "cpu"


def test_algebra_needs_room_for_six_matrices_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.devices.chosen_device", lambda _wanted: AWAY)
    for matrices, there in ((6, AWAY.type), (5.99, "cpu")):
        free = int(matrices * 8 * 14_336**2)
        monkeypatch.setattr("anysize.devices._free_bytes", lambda _device, free=free: free)
        assert device_for_algebra(14_336).type == there


def test_without_an_accelerator_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto").type == "cpu"
    assert device_with(1).type == "cpu"
