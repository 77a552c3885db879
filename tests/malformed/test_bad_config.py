"""Configs that ask transformers for what it does not have: one sentence, and nothing is fetched for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.conftest import CONFIG

import anysize
from anysize.config import understand
from anysize.errors import ArchitectureError
from anysize.io.models import config_of
from anysize.proof.parity import load
from anysize.training.start import load as load_to_train


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"hidden_act": "nope"}, "transformers cannot build a LlamaForCausalLM of this config: KeyError"),
        ({"attn_implementation": "foo"}, "the config's attn_implementation is 'foo', wanted one of eager, sdpa"),
        ({"_attn_implementation": "evil/kern"}, "the config's _attn_implementation is 'evil/kern', wanted one of"),
        ({"attn_implementation": {"": "evil/kern"}}, "the config's attn_implementation is {'': 'evil/kern'}"),
    ],
)
def test_a_config_that_cannot_be_built_is_one_sentence(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], told: str,
) -> None:  # fmt: skip
    def fetched(*_: object, **__: object) -> None:
        pytest.fail("a kernel was asked for")

    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", fetched)
    source = new_llama(tmp_path / "source", **changes)
    for low_memory in (False, True):
        with pytest.raises(ArchitectureError, match=told):
            anysize.calibrate(source, text, sequence_length=64, tokens=512, low_memory=low_memory)
    for loads in (lambda: load(source, "LlamaForCausalLM"), lambda: load_to_train(str(source), torch.float32)):
        with pytest.raises(ArchitectureError, match=told):
            loads()


@pytest.mark.parametrize("positions", [-3, 0, "many", 2.5, True])
def test_a_number_of_positions_that_is_none_is_told_of_the_config(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path, cli: Callable[..., Any], positions: object
) -> None:
    source = new_llama(tmp_path / "source", max_position_embeddings=positions)
    told = f"anysize: the config's sizes make no sense: max_position_embeddings={positions!r} is no whole number of"
    out, scores = tmp_path / "out", tmp_path / "scores.safetensors"
    for command in (
        ("resize", source, out, "--hidden-size", 16, "--calibration", text),
        ("calibrate", source, text, "-o", scores),
    ):
        ran = cli(*command)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith(told)
        assert ran.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(("family", "key"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings")])
@pytest.mark.parametrize("positions", [-1, 0, "many"])
def test_positions_that_have_weights_are_told_once(family: str, key: str, positions: object) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == family)
    with pytest.raises(ArchitectureError) as refusal:
        understand({**tiny.config(variant), key: positions})
    assert str(refusal.value).count(f"{key}={positions!r}") == 1


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_way_to_run_attention_for_speed_alone_is_left_to_transformers(key: str) -> None:
    assert config_of({**CONFIG, key: "eager"})._attn_implementation == "eager"
    assert config_of({**CONFIG, key: "flash_attention_2"})._attn_implementation is None
