"""OLMo: Llama with LayerNorms that have neither gain nor bias, and clipped projections."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_FFN_BIAS, NO_FFN_BIAS_DEFAULTS
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.qwen2 import TIED_KEYS, TIED_WIDTH, WHOLE_HEADS
from anysize.arch.schema import Norm

ARCHITECTURE = LLAMA.derive(
    "olmo",
    ("OlmoForCausalLM",),
    axes=TIED_WIDTH,
    keys=TIED_KEYS,
    parameters=NO_FFN_BIAS,
    stream_eps="",
    norms={name: Norm("layer", "hidden", "norm(hidden)", stored="False") for name in LLAMA.norms},
    rules=(WHOLE_HEADS, EVEN_HEADS),
    defaults={key: value for key, value in NO_FFN_BIAS_DEFAULTS.items() if key != "head_dim"},
    kept={**LLAMA.kept, "clip_qkv": "acts on each projected channel alone"},
)
