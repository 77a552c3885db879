"""OLMo: Llama with LayerNorms that have neither gain nor bias, and clipped projections."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.qwen2 import TIED_KEYS, TIED_WIDTH, WHOLE_HEADS
from anysize.arch.schema import Norm

ARCHITECTURE = LLAMA.derive(
    "olmo",
    ("OlmoForCausalLM",),
    axes=TIED_WIDTH,
    keys=TIED_KEYS,
    parameters={name: p for name, p in LLAMA.parameters.items() if ".mlp." not in name or name.endswith("weight")},
    norms={name: Norm("layer", "hidden", "norm(hidden)", stored="False") for name in LLAMA.norms},
    rules=(WHOLE_HEADS, EVEN_HEADS),
    defaults={key: value for key, value in LLAMA.defaults.items() if key not in ("head_dim", "mlp_bias")},
    kept={**LLAMA.kept, "clip_qkv": "acts on each projected channel alone"},
)
