"""OLMo 2: branches read the raw stream and end in a norm; query and key norms span all heads."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.olmo import ARCHITECTURE as OLMO
from anysize.arch.schema import Norm, Parameter

BRANCH_NORM = Norm("rms", "hidden", "hidden")

ARCHITECTURE = OLMO.derive(
    "olmo2",
    ("Olmo2ForCausalLM",),
    parameters={
        **OLMO.parameters,
        "model.layers.{layer}.self_attn.q_proj.weight": Parameter("hidden -> (kv group query(head))"),
        "model.layers.{layer}.self_attn.k_proj.weight": Parameter("hidden -> (kv key(head))"),
        "model.layers.{layer}.self_attn.v_proj.weight": Parameter("hidden -> (kv head)"),
        "model.layers.{layer}.mlp.gate_proj.weight": Parameter("hidden -> ffn"),
        "model.layers.{layer}.mlp.up_proj.weight": Parameter("hidden -> ffn"),
    },
    stream_eps="rms_norm_eps",
    norms={
        "model.layers.{layer}.self_attn.q_norm": Norm("rms", "(kv group head)", "(kv group head)"),
        "model.layers.{layer}.self_attn.k_norm": Norm("rms", "(kv head)", "(kv head)"),
        "model.layers.{layer}.post_attention_layernorm": BRANCH_NORM,
        "model.layers.{layer}.post_feedforward_layernorm": BRANCH_NORM,
        "model.norm": Norm("rms", "hidden", "norm(hidden)"),
    },
    kept=LLAMA.kept,
)
