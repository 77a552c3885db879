"""Qwen3: Llama with a norm on each query and key head, and a head width of its own."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_FFN_BIAS, NO_FFN_BIAS_DEFAULTS
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.qwen2 import ARCHITECTURE as QWEN2
from anysize.arch.schema import Norm

ARCHITECTURE = LLAMA.derive(
    "qwen3",
    ("Qwen3ForCausalLM",),
    parameters=NO_FFN_BIAS,
    norms={
        **LLAMA.norms,
        "model.layers.{layer}.self_attn.q_norm": Norm("rms", "head", "head"),
        "model.layers.{layer}.self_attn.k_norm": Norm("rms", "head", "head"),
    },
    rules=(EVEN_HEADS,),
    defaults={**NO_FFN_BIAS_DEFAULTS, "num_key_value_heads": 32, "head_dim": 128},
    kept=QWEN2.kept,
    per_layer=("layer_types",),
)
