"""Mixtral: Mistral with a router and several feed-forward experts in the place of one."""

from anysize.arch.mistral import ARCHITECTURE as MISTRAL
from anysize.arch.schema import Parameter, Rule

WITHOUT_FFN = {name: p for name, p in MISTRAL.parameters.items() if ".mlp." not in name}
ROUTER_KEPT = {
    "output_router_logits": "what forward returns",
    "router_aux_loss_coef": "training only",
    "router_jitter_noise": "training only",
}
CHOSEN = "the router chooses num_experts_per_tok experts for every token"

ARCHITECTURE = MISTRAL.derive(
    "mixtral",
    ("MixtralForCausalLM",),
    axes={**MISTRAL.axes, "expert": "num_local_experts"},
    keys={**MISTRAL.keys, "expert": "num_local_experts"},
    parameters={
        **WITHOUT_FFN,
        "model.layers.{layer}.block_sparse_moe.gate.weight": Parameter("norm(hidden) -> expert"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight": Parameter("norm(hidden) -> ffn"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight": Parameter("norm(hidden) -> ffn"),
        "model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight": Parameter("ffn -> hidden"),
    },
    rules=(*MISTRAL.rules, Rule("num_experts_per_tok <= num_local_experts", CHOSEN)),
    defaults={**MISTRAL.defaults, "num_local_experts": 8, "num_experts_per_tok": 2},
    kept={**MISTRAL.kept, **ROUTER_KEPT},
)
