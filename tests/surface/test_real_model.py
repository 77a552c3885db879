"""The main job on a real pretrained model, where one lies beside the checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anysize.api import apply_with_proof, plan
from anysize.io.models import quiet_transformers

MODEL = Path(__file__).parents[3] / "shared" / "data" / "stories260K"
pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the pretrained test model is not beside this checkout")
SIZES: dict[str, dict[str, Any]] = {
    "integer": {"hidden_size": 128},
    "fractional": {"hidden_size": 96, "intermediate_size": 301},
    "everything": {"hidden_size": 144, "num_attention_heads": 12, "num_key_value_heads": 6, "num_hidden_layers": 7},
}


def story(folder: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    with torch.no_grad():
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, do_sample=False,
                             pad_token_id=0)  # fmt: skip
    return tokenizer.decode(ids[0], skip_special_tokens=True)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("preset", ["hypercloning", "split", "fresh"])
def test_a_grown_model_tells_the_same_story(name: str, preset: str, tmp_path: Path) -> None:
    output, proof = apply_with_proof(plan(MODEL, preset=preset, **SIZES[name]), tmp_path / "grown", verify="full")
    assert proof.passed
    told = story(output)
    assert told == story(MODEL)
    assert "there was a little girl" in told
