"""Llama: RMSNorm before each branch, rotary positions, grouped-query attention, gated feed-forward."""

from anysize.arch.schema import Architecture, Norm, Parameter, Rule

PRE_NORM = Norm("rms", "hidden", "norm(hidden)")

ARCHITECTURE = Architecture(
    model_type="llama",
    classes=("LlamaForCausalLM",),
    axes={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "kv": "num_key_value_heads or num_attention_heads",
        "group": "num_attention_heads // (num_key_value_heads or num_attention_heads)",
        "head": "head_dim or hidden_size // num_attention_heads",
        "layer": "num_hidden_layers",
    },
    keys={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "kv": "num_key_value_heads",
        "head": "head_dim",
        "layer": "num_hidden_layers",
    },
    base="model",
    parameters={
        "model.embed_tokens.weight": Parameter("vocab -> hidden, stored in x out"),
        "model.layers.{layer}.self_attn.q_proj.weight": Parameter("norm(hidden) -> (kv group query(head))"),
        "model.layers.{layer}.self_attn.q_proj.bias": Parameter("-> (kv group query(head))", "attention_bias"),
        "model.layers.{layer}.self_attn.k_proj.weight": Parameter("norm(hidden) -> (kv key(head))"),
        "model.layers.{layer}.self_attn.k_proj.bias": Parameter("-> (kv key(head))", "attention_bias"),
        "model.layers.{layer}.self_attn.v_proj.weight": Parameter("norm(hidden) -> (kv head)"),
        "model.layers.{layer}.self_attn.v_proj.bias": Parameter("-> (kv head)", "attention_bias"),
        "model.layers.{layer}.self_attn.o_proj.weight": Parameter("(kv group head) -> hidden"),
        "model.layers.{layer}.self_attn.o_proj.bias": Parameter("-> hidden", "attention_bias"),
        "model.layers.{layer}.mlp.gate_proj.weight": Parameter("norm(hidden) -> ffn"),
        "model.layers.{layer}.mlp.gate_proj.bias": Parameter("-> ffn", "mlp_bias"),
        "model.layers.{layer}.mlp.up_proj.weight": Parameter("norm(hidden) -> ffn"),
        "model.layers.{layer}.mlp.up_proj.bias": Parameter("-> ffn", "mlp_bias"),
        "model.layers.{layer}.mlp.down_proj.weight": Parameter("ffn -> hidden"),
        "model.layers.{layer}.mlp.down_proj.bias": Parameter("-> hidden", "mlp_bias"),
        "lm_head.weight": Parameter("norm(hidden) -> vocab"),
    },
    norms={
        "model.layers.{layer}.input_layernorm": PRE_NORM,
        "model.layers.{layer}.post_attention_layernorm": PRE_NORM,
        "model.norm": PRE_NORM,
    },
    final_norm="model.norm",
    stream_eps="rms_norm_eps",
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    rules=(
        Rule("hidden_size % num_attention_heads == 0", "LlamaConfig wants hidden_size divisible by the heads"),
        Rule("num_attention_heads % num_key_value_heads == 0", "query heads are shared out evenly over kv heads"),
    ),
    defaults={
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "num_key_value_heads": None,
        "head_dim": None,
        "initializer_range": 0.02,
    },
    kept={
        "hidden_act": "acts on each ffn neuron alone",
        "rms_norm_eps": "statistics of hidden are unchanged, or it is changed with them (stream_scale)",
        "rope_parameters": "rotates within a head, whose width is unchanged",
        "rope_theta": "rotates within a head, whose width is unchanged",
        "rope_scaling": "rotates within a head, whose width is unchanged",
        "max_position_embeddings": "rotary positions have no weights",
        "is_llama_config": "provenance",
        "pretraining_tp": "splits a product, same result",
    },
    dropped={
        "model.layers.{layer}.self_attn.rotary_emb.inv_freq": "a buffer that transformers computes",
    },
)

# Most descendants dropped the feed-forward biases, and some all of them.
NO_FFN_BIAS = {name: p for name, p in ARCHITECTURE.parameters.items() if p.when != "mlp_bias"}
NO_BIAS = {name: p for name, p in NO_FFN_BIAS.items() if p.when != "attention_bias"}
NO_FFN_BIAS_DEFAULTS = {key: value for key, value in ARCHITECTURE.defaults.items() if key != "mlp_bias"}
NO_BIAS_DEFAULTS = {key: value for key, value in NO_FFN_BIAS_DEFAULTS.items() if key != "attention_bias"}
