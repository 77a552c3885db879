"""Too few calibration tokens for what is solved with them are refused, few are told, each with the number needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import anysize
from anysize.calibration.scores import Scores
from anysize.errors import InputError


def with_samples(scores: Scores, samples: int) -> Scores:
    changes = {"samples": samples, "tokens": samples, "sequence_length": 8}
    return replace(scores, record=scores.record.model_copy(update=changes))


def test_too_few_tokens_for_what_is_fitted_are_refused_with_the_number_that_is_needed(llama: Path, text: Path) -> None:
    kept = 24
    for tokens in (16, kept):
        few = anysize.calibrate(llama, text, tokens=tokens, sequence_length=8, batch_size=1)
        told = rf"{tokens} samples .* {kept} kept coordinates .* --tokens 32 at the very least"
        with pytest.raises(InputError, match=told):
            anysize.plan(llama, hidden_size=kept, calibration=few)

    enough = anysize.calibrate(llama, text, tokens=32, sequence_length=8, batch_size=1)
    assert anysize.plan(llama, hidden_size=kept, calibration=enough).options.readers == "sequential"


@pytest.mark.parametrize(
    ("sizes", "kept", "told"),
    [
        ({"intermediate_size": 12}, 12, "choose the 12 kept coordinates of ffn by what removing the others costs"),
        # kv heads are chosen while all query heads of each are there.
        ({"num_attention_heads": 1, "num_key_value_heads": 1}, 16, "choose the 16 kept coordinates of heads"),
    ],
)
@pytest.mark.parametrize("readers", ["none", "fan-in"])
def test_too_few_tokens_for_a_choice_by_removal_are_refused(
    llama: Path, scores: Scores, sizes: dict[str, Any], kept: int, told: str, readers: str
) -> None:
    asked: dict[str, Any] = {"select": "refit", "readers": readers, **sizes}
    with pytest.raises(InputError, match=f"hold {kept} samples of each activation, too few to {told}"):
        anysize.plan(llama, calibration=with_samples(scores, kept), **asked)
    assert anysize.plan(llama, calibration=with_samples(scores, kept + 1), **asked).recipes
    # Neither asks for second moments: means choose of the stream, and of everything under the other.
    one = with_samples(scores, 1)
    assert anysize.plan(llama, calibration=one, select="refit", readers=readers, hidden_size=16).recipes
    assert anysize.plan(llama, calibration=one, select="activation", readers=readers, **sizes).recipes


@pytest.mark.parametrize(
    ("asked", "enough", "told"),
    [
        ({"hidden_size": 16, "readers": "least-squares"}, 64,
         "what reads the 16 kept coordinates of hidden is fitted to 63 samples, which is few: calibrate with "
         "--tokens 64 or more"),
        ({"intermediate_size": 12, "select": "refit", "readers": "none"}, 48,
         "the 12 kept coordinates of ffn are chosen by 47 samples, which is few: calibrate with --tokens 48 or more"),
    ],
)  # fmt: skip
def test_few_tokens_are_told(llama: Path, scores: Scores, asked: dict[str, Any], enough: int, told: str) -> None:
    few, fine = (anysize.plan(llama, calibration=with_samples(scores, n), **asked).notes for n in (enough - 1, enough))
    assert told in few
    assert not any("which is few" in note for note in fine)
