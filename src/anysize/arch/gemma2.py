"""Gemma 2: Gemma with a norm at the end of each branch as well, soft caps and alternating windows."""

from anysize.arch.gemma import ARCHITECTURE as GEMMA
from anysize.arch.gemma import PRE_NORM
from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.schema import Norm

BRANCH_NORM = Norm("rms", "hidden", "hidden", gain="1+w")

ARCHITECTURE = GEMMA.derive(
    "gemma2",
    ("Gemma2ForCausalLM",),
    norms={
        "model.layers.{layer}.input_layernorm": PRE_NORM,
        "model.layers.{layer}.post_attention_layernorm": BRANCH_NORM,
        "model.layers.{layer}.pre_feedforward_layernorm": PRE_NORM,
        "model.layers.{layer}.post_feedforward_layernorm": BRANCH_NORM,
        "model.norm": PRE_NORM,
    },
    rules=LLAMA.rules,
    defaults={**GEMMA.defaults, "num_key_value_heads": 4},
    kept={
        **GEMMA.kept,
        "query_pre_attn_scalar": "a fixed score scale; the head width is unchanged",
        "attn_logit_softcapping": "acts on each score alone",
        "final_logit_softcapping": "acts on each logit alone",
        "sliding_window": "masks positions, the same in every width",
        "sliding_window_size": "an older name of sliding_window",
        "cache_implementation": "speed only",
    },
    per_layer=("layer_types",),
)
