"""Gemma 3, text: Gemma 2 with a norm on each query and key head, and rotary bases by layer type."""

from anysize.arch.gemma2 import ARCHITECTURE as GEMMA2
from anysize.arch.schema import Norm

ARCHITECTURE = GEMMA2.derive(
    "gemma3_text",
    ("Gemma3ForCausalLM",),
    norms={
        **GEMMA2.norms,
        "model.layers.{layer}.self_attn.q_norm": Norm("rms", "head", "head", gain="1+w"),
        "model.layers.{layer}.self_attn.k_norm": Norm("rms", "head", "head", gain="1+w"),
    },
    kept={
        **GEMMA2.kept,
        "rope_local_base_freq": "rotates within a head, whose width is unchanged",
        "sliding_window_pattern": "decides layer_types, which follow the layer plan",
        "_sliding_window_pattern": "decides layer_types, which follow the layer plan",
    },
)
