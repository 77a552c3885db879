"""Qwen3-MoE: Qwen3 with a router and experts in the place of the feed-forward of every layer."""

from anysize.arch.mixtral import CHOSEN
from anysize.arch.olmoe import EXPERTS, TOPK_KEPT, WITHOUT_FFN
from anysize.arch.qwen3 import ARCHITECTURE as QWEN3
from anysize.arch.schema import Rule

ARCHITECTURE = QWEN3.derive(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    axes={**QWEN3.axes, "ffn": "moe_intermediate_size", "expert": "num_local_experts"},
    keys={**QWEN3.keys, "ffn": "moe_intermediate_size", "expert": "num_local_experts"},
    parameters={**WITHOUT_FFN, **EXPERTS},
    rules=(*QWEN3.rules, Rule("num_experts_per_tok <= num_local_experts", CHOSEN)),
    refused=(
        Rule(
            "decoder_sparse_step == 1 and not mlp_only_layers",
            "dense layers among those of experts have a feed-forward size of their own",
        ),
    ),
    defaults={
        **QWEN3.defaults,
        "num_key_value_heads": 4,
        "head_dim": None,
        "moe_intermediate_size": 768,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    kept={**QWEN3.kept, **TOPK_KEPT, "intermediate_size": "of dense layers, of which there are none"},
    per_layer=(),
    renamed={"num_experts": "num_local_experts"},
)
