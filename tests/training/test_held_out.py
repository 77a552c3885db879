"""Held-out figures of several processes: every example counts once, whatever fills up their last batches."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anysize.progress import quiet
from anysize.training.config import train_config
from anysize.training.run import train
from anysize.training.trainer import AnysizeTrainer
from tests.training.runs import config_of, record
from tests.training.test_resume import asked_of


class _CaughtError(Exception):
    def __init__(self, trainer: AnysizeTrainer) -> None:
        self.trainer = trainer


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AnysizeTrainer:
    """The trainer of a ViT, right before it trains."""

    def caught(self: AnysizeTrainer, **_: object) -> None:
        raise _CaughtError(self)

    monkeypatch.setattr(AnysizeTrainer, "train", caught)
    config = asked_of("vit", tmp_path, tmp_path / "out")
    with pytest.raises(_CaughtError) as found:
        train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    return found.value.trainer


@pytest.mark.parametrize(("process", "remainder", "counted"), [(0, 3, 3), (0, 7, 4), (1, 7, 3), (1, 3, 4), (0, 0, 4)])
def test_copies_are_left_out_and_rows_are_as_many(
    images: AnysizeTrainer, process: int, remainder: int, counted: int
) -> None:
    dataset: Any = images.train_dataset
    data: Any = images.data_collator
    whole = data([dataset[i] for i in range(4)])
    model = images.model
    assert model is not None
    loss_of, (_, logits, _) = {}, images.prediction_step(model, dict(whole), False)
    for count in (3, 4):
        loss_of[count] = float(images.prediction_step(model, {k: v[:count] for k, v in whole.items()}, False)[0])
    assert abs(loss_of[3] - loss_of[4]) > 1e-4
    end = SimpleNamespace(end_of_dataloader=remainder > 0, remainder=remainder)
    images.accelerator = SimpleNamespace(gradient_state=end, process_index=process)  # type: ignore[assignment]
    loss, found, labels = images.prediction_step(model, dict(whole), False)
    assert float(loss) == pytest.approx(loss_of[counted], abs=1e-6)
    assert (len(found), len(labels)) == (4, 4)
    assert torch.allclose(found[:counted], logits[:counted], atol=1e-6)


def test_bits_are_those_of_the_last_loss(llama: Path, story: Path, tmp_path: Path) -> None:
    config = config_of(llama, story, tmp_path / "out", training={"max_steps": 2, "eval_steps": 2})
    train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    found = record(tmp_path / "out")
    words = story.read_text().split()
    # A token is a word here, and one ends the text.
    each = len(story.read_bytes()) / (len(words) + 1)
    assert found["bits_per_byte"]["validation"] == pytest.approx(
        found["curve"]["2"]["validation"] / each / math.log(2), rel=0.05
    )
