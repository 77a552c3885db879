"""Qwen2: Llama with biases on queries, keys and values, and a head width that follows hidden and heads."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_BIAS, NO_BIAS_DEFAULTS
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.schema import Parameter, Rule

# The config class has no head width of its own, and not every runtime reads one from it.
WHOLE_HEADS = Rule("hidden_size % num_attention_heads == 0", "the head width is hidden_size / num_attention_heads")
TIED_WIDTH = {**LLAMA.axes, "head": "hidden_size // num_attention_heads"}
TIED_KEYS = {axis: key for axis, key in LLAMA.keys.items() if axis != "head"}

ARCHITECTURE = LLAMA.derive(
    "qwen2",
    ("Qwen2ForCausalLM",),
    axes=TIED_WIDTH,
    keys=TIED_KEYS,
    parameters={
        **NO_BIAS,
        "model.layers.{layer}.self_attn.q_proj.bias": Parameter("-> (kv group query(head))"),
        "model.layers.{layer}.self_attn.k_proj.bias": Parameter("-> (kv key(head))"),
        "model.layers.{layer}.self_attn.v_proj.bias": Parameter("-> (kv head)"),
    },
    rules=(WHOLE_HEADS, EVEN_HEADS),
    defaults={key: value for key, value in NO_BIAS_DEFAULTS.items() if key != "head_dim"} | {"num_key_value_heads": 32},
    kept={
        **LLAMA.kept,
        "sliding_window": "masks positions, the same in every width",
        "use_sliding_window": "decides layer_types, which follow the layer plan",
        "max_window_layers": "decides layer_types, which follow the layer plan",
    },
    per_layer=("layer_types",),
)
