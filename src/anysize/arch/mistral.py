"""Mistral: Llama without biases, with a head width of its own and a sliding window."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_BIAS, NO_BIAS_DEFAULTS
from anysize.arch.schema import Rule

EVEN_HEADS = Rule("num_attention_heads % num_key_value_heads == 0", "query heads are shared out evenly over kv heads")

ARCHITECTURE = LLAMA.derive(
    "mistral",
    ("MistralForCausalLM",),
    parameters=NO_BIAS,
    rules=(EVEN_HEADS,),
    defaults={**NO_BIAS_DEFAULTS, "num_key_value_heads": 8},
    kept={**LLAMA.kept, "sliding_window": "masks positions, the same in every width"},
)
