"""Phi-3: Llama with queries, keys and values in one tensor, and gate and up in another."""

from anysize.arch.llama import ARCHITECTURE as LLAMA
from anysize.arch.mistral import EVEN_HEADS
from anysize.arch.qwen2 import TIED_KEYS, TIED_WIDTH, WHOLE_HEADS
from anysize.arch.schema import Parameter

ARCHITECTURE = LLAMA.derive(
    "phi3",
    ("Phi3ForCausalLM",),
    axes=TIED_WIDTH,
    keys=TIED_KEYS,
    parameters={
        "model.embed_tokens.weight": Parameter("vocab -> hidden, stored in x out"),
        "model.layers.{layer}.self_attn.qkv_proj.weight": Parameter(
            "norm(hidden) -> (kv group query(head)) + (kv key(head)) + (kv head)"
        ),
        "model.layers.{layer}.self_attn.o_proj.weight": Parameter("(kv group head) -> hidden"),
        "model.layers.{layer}.mlp.gate_up_proj.weight": Parameter("norm(hidden) -> ffn + ffn"),
        "model.layers.{layer}.mlp.down_proj.weight": Parameter("ffn -> hidden"),
        "lm_head.weight": Parameter("norm(hidden) -> vocab"),
    },
    rules=(WHOLE_HEADS, EVEN_HEADS),
    defaults={"tie_word_embeddings": False, "num_key_value_heads": None, "initializer_range": 0.02},
    kept={
        **LLAMA.kept,
        "resid_pdrop": "training only",
        "embd_pdrop": "training only",
        "original_max_position_embeddings": "rotary positions have no weights",
        "partial_rotary_factor": "rotates within a head, whose width is unchanged",
        "sliding_window": "masks positions, the same in every width",
        "attention_bias": "not read by the model, which has no biases",
    },
)
