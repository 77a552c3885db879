"""Draft models: what a check gives, a perfect draft and a useless one, and the command from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anysize.errors import InputError
from anysize.evals.drafting import accepted, measure_drafting
from anysize.training.start import load
from tests.training.test_run import story as story


@pytest.mark.parametrize(
    ("agree", "drafted", "wanted"),
    [("11111111", 3, 4.0), ("00000000", 3, 1.0), ("10101010", 3, 2.0), ("11101110", 3, 4.0), ("11101110", 1, 2.0)],
)
def test_a_check_gives_what_agrees_and_one_more(agree: str, drafted: int, wanted: float) -> None:
    source = torch.zeros(len(agree), dtype=torch.long)
    assert accepted(source, 1 - torch.tensor([int(a) for a in agree]), drafted) == wanted


def test_a_source_is_its_own_perfect_draft_and_another_model_is_not(llama: Path, new_llama: Callable[..., Path],
                                                                    tmp_path: Path) -> None:  # fmt: skip
    source, twin = (load(str(llama), torch.float32) for _ in range(2))
    other = load(str(new_llama(tmp_path / "other", seed=7)), torch.float32)
    prompts = torch.arange(3, 33).reshape(3, 10)
    perfect = measure_drafting(source, twin, prompts, new_tokens=12, num_drafted=3)
    assert perfect.acceptance_rate == 1.0
    assert perfect.tokens_a_check == 4.0
    assert perfect.same_text
    assert (perfect.num_prompts, perfect.num_tokens) == (3, 36)
    useless = measure_drafting(source, other, prompts, new_tokens=12, num_drafted=3)
    assert useless.acceptance_rate < 0.5
    assert useless.tokens_a_check < 2
    assert useless.same_text


def test_a_draft_of_another_vocabulary_is_refused(llama: Path, new_llama: Callable[..., Path], tmp_path: Path) -> None:
    models = [load(str(place), torch.float32) for place in (llama, new_llama(tmp_path / "other", vocab_size=47))]
    with pytest.raises(InputError, match="has 61 tokens and the draft 47"):
        measure_drafting(models[0], models[1], torch.ones(1, 4, dtype=torch.long), new_tokens=2)


def test_the_command_makes_teaches_and_measures(
    llama: Path, story: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    asked = ("draft", llama, tmp_path / "out", "--data", story, "--held-out", story, "--num-hidden-layers", 1,
             "--steps", 4, "--batch-size", 4, "--sequence-length", 32, "--prompts", 2, "--new-tokens", 8)  # fmt: skip
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["drafting"]["num_tokens"] == 16
    assert 0 <= found["drafting"]["acceptance_rate"] <= 1
    assert found["drafting"]["same_text"] is True
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    refused = cli(*asked[:-1], 200)
    assert refused.code == 2
    assert "the source has positions for 128" in refused.err
