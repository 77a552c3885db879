"""OLMoE: Llama with a router and experts in the place of the feed-forward, and query and key norms over all heads."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.llama import NO_FFN_BIAS
from anysize.arch.mixtral import CHOSEN, ROUTER_KEPT
from anysize.arch.olmo import ARCHITECTURE as OLMO
from anysize.arch.schema import Norm, Parameter, Rule

EXPERTS = {
    "model.layers.{layer}.mlp.gate.weight": Parameter("norm(hidden) -> expert"),
    "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight": Parameter("norm(hidden) -> ffn"),
    "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": Parameter("norm(hidden) -> ffn"),
    "model.layers.{layer}.mlp.experts.{expert}.down_proj.weight": Parameter("ffn -> hidden"),
}
WITHOUT_FFN = {name: p for name, p in NO_FFN_BIAS.items() if ".mlp." not in name}
TOPK_KEPT = {**ROUTER_KEPT, "norm_topk_prob": "weighs the experts chosen, which every width chooses alike"}

ARCHITECTURE = OLMO.derive(
    "olmoe",
    ("OlmoeForCausalLM",),
    axes={**OLMO.axes, "expert": "num_experts"},
    keys={**OLMO.keys, "expert": "num_experts"},
    parameters={**WITHOUT_FFN, **EXPERTS},
    stream_eps="rms_norm_eps",
    norms={
        **LLAMA.norms,
        "model.layers.{layer}.self_attn.q_norm": Norm("rms", "(kv group head)", "(kv group head)"),
        "model.layers.{layer}.self_attn.k_norm": Norm("rms", "(kv head)", "(kv head)"),
    },
    rules=(*OLMO.rules, Rule("num_experts_per_tok <= num_experts", CHOSEN)),
    defaults={**OLMO.defaults, "num_experts": 64, "num_experts_per_tok": 8},
    kept={**OLMO.kept, **TOPK_KEPT},
)
