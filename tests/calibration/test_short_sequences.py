"""Sequences are no longer than a model has positions for: what is longer is refused, and nobody asks for it unasked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anysize
from anysize.calibration.data import DataOptions, default_length
from anysize.calibration.share import CalibrationOptions, check_options
from anysize.config import understand
from anysize.errors import InputError
from anysize.training.config import Calibration
from anysize.training.start import calibration_of
from tests import image_files, tiny


@pytest.mark.parametrize("name", ["gpt2-tied", "opt-untied"])
def test_a_sequence_beyond_learned_positions_is_refused(name: str) -> None:
    source = tiny.source(next(v for v in tiny.VARIANTS if str(v) == name))
    check_options(source, "", CalibrationOptions(DataOptions(sequence_length=19)))
    with pytest.raises(InputError, match=r"sequences of 20 tokens are too long: .* has 19 positions; give"):
        check_options(source, "", CalibrationOptions(DataOptions(sequence_length=20)))


def test_a_sequence_beyond_rotary_positions_is_refused_and_leaves_nothing(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"sequences of 256 tokens are too long: .* has 128 positions"):
        anysize.calibrate(llama, text, sequence_length=256, output=tmp_path / "scores.safetensors")
    assert not list(tmp_path.iterdir())
    assert anysize.calibrate(llama, text, tokens=512).record.sequence_length == 128


def test_what_calibrates_by_itself_takes_sequences_that_fit(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    short = new_llama(tmp_path / "short", max_position_embeddings=16)
    seen: list[Any] = []
    plan = anysize.plan(short, calibration=text, intermediate_size=24, progress=lambda *told: seen.append(told))
    assert plan.axes
    assert ("calibrate", 0, 131_072) in seen
    config = understand(plan.source_config)
    assert default_length(config) == calibration_of(Calibration(), config).sequence_length == 16
    assert calibration_of(Calibration(sequence_length=32), config).sequence_length == 32
    # An image is many samples.
    images = image_files.config_beside(image_files.saved_vit(tmp_path / "vit"))
    assert calibration_of(Calibration(), images).tokens == 2_048
    assert calibration_of(Calibration(), config).tokens == 131_072
