"""Configs that ask transformers for what it does not have: one sentence, and nothing is fetched for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import CONFIG

import anysize
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


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_way_to_run_attention_for_speed_alone_is_left_to_transformers(key: str) -> None:
    assert config_of({**CONFIG, key: "eager"})._attn_implementation == "eager"
    assert config_of({**CONFIG, key: "flash_attention_2"})._attn_implementation is None
