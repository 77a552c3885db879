"""Checkpoints of any size for benchmarks: random values of a trained model's scale, or headers without weights."""

from __future__ import annotations

import json
import struct
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from anysize.config import understand
from anysize.io.dtypes import TORCH
from anysize.recipe import BYTES
from anysize.tensors import expected_tensors, shape_of

_SMALLEST = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152, "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 8192,
}  # fmt: skip
# Configs of the sources that examples/ name, by what they are called there.
SMOLLM2: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": _SMALLEST,
    "HuggingFaceTB/SmolLM2-1.7B": _SMALLEST | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}  # fmt: skip


def llama_config(
    *, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, dtype: str = "bfloat16"
) -> dict[str, Any]:
    """Return a Llama config of these sizes."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads, "vocab_size": vocab, "tie_word_embeddings": False, "dtype": dtype,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 2048, "initializer_range": 0.02,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }  # fmt: skip


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    understood = understand(config)
    return {name: shape_of(item.arrow, understood.sizes) for name, item in expected_tensors(understood).items()}


def random_checkpoint(folder: Path, config: dict[str, Any], *, storage: str = "BF16", seed: int = 0) -> int:
    """Write a single-file checkpoint of seeded random weights unless it is there; return its size in bytes."""
    weights = folder / "model.safetensors"
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        generator = np.random.default_rng(seed)
        tensors = {
            name: torch.from_numpy(generator.standard_normal(shape, dtype=np.float32) * 0.02).to(TORCH[storage])
            for name, shape in _shapes(config).items()
        }
        save_file(tensors, weights, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    return weights.stat().st_size


def hollow_checkpoint(folder: Path, config: dict[str, Any], *, num_files: int, storage: str = "BF16") -> int:
    """Write headers whose weights are holes in sparse files, so nothing lies on the disk; return the apparent size."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = list(_shapes(config).items())
    weight_map: dict[str, str] = {}
    total = 0
    for number in range(num_files):
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        header: dict[str, Any] = {}
        position = 0
        for tensor, shape in shapes[number::num_files]:
            size = prod(shape) * BYTES[storage]
            header[tensor] = {"dtype": storage, "shape": list(shape), "data_offsets": [position, position + size]}
            weight_map[tensor] = name
            position += size
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
        total += position
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return total
