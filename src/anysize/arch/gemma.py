"""Gemma: Llama with embeddings multiplied by the square root of hidden, and gains stored as 1 + w."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_FFN_BIAS, NO_FFN_BIAS_DEFAULTS
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.schema import Norm, Parameter

PRE_NORM = Norm("rms", "hidden", "norm(hidden)", gain="1+w")

ARCHITECTURE = LLAMA.derive(
    "gemma",
    ("GemmaForCausalLM",),
    parameters={
        **NO_FFN_BIAS,
        "model.embed_tokens.weight": Parameter("vocab -> hidden, stored in x out", times="hidden"),
    },
    norms=dict.fromkeys(LLAMA.norms, PRE_NORM),
    rules=(EVEN_HEADS,),
    defaults={**NO_FFN_BIAS_DEFAULTS, "tie_word_embeddings": True, "num_key_value_heads": 16, "head_dim": 256},
    kept={
        **LLAMA.kept,
        "hidden_activation": "acts on each ffn neuron alone",
        "use_bidirectional_attention": "masks positions, the same in every width",
    },
)
