"""GPT-NeoX and Pythia: LayerNorm, partial rotary positions, queries, keys and values interleaved by head."""

from anysize.arch.schema import Architecture, Norm, Parameter, Rule

PRE_NORM = Norm("layer", "hidden", "norm(hidden)", bias="True")

ARCHITECTURE = Architecture(
    model_type="gpt_neox",
    classes=("GPTNeoXForCausalLM",),
    axes={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "kv": "num_attention_heads",
        "group": "1",
        "head": "hidden_size // num_attention_heads",
        "layer": "num_hidden_layers",
    },
    keys={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "layer": "num_hidden_layers",
    },
    base="gpt_neox",
    parameters={
        "gpt_neox.embed_in.weight": Parameter("vocab -> hidden, stored in x out"),
        "gpt_neox.layers.{layer}.attention.query_key_value.weight": Parameter("norm(hidden) -> (kv 3 head)"),
        "gpt_neox.layers.{layer}.attention.query_key_value.bias": Parameter("-> (kv 3 head)", "attention_bias"),
        "gpt_neox.layers.{layer}.attention.dense.weight": Parameter("(kv head) -> hidden"),
        "gpt_neox.layers.{layer}.attention.dense.bias": Parameter("-> hidden", "attention_bias"),
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight": Parameter("norm(hidden) -> ffn"),
        "gpt_neox.layers.{layer}.mlp.dense_h_to_4h.bias": Parameter("-> ffn"),
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.weight": Parameter("ffn -> hidden"),
        "gpt_neox.layers.{layer}.mlp.dense_4h_to_h.bias": Parameter("-> hidden"),
        "embed_out.weight": Parameter("norm(hidden) -> vocab"),
    },
    norms={
        "gpt_neox.layers.{layer}.input_layernorm": PRE_NORM,
        "gpt_neox.layers.{layer}.post_attention_layernorm": PRE_NORM,
        "gpt_neox.final_layer_norm": PRE_NORM,
    },
    final_norm="gpt_neox.final_layer_norm",
    stream_eps="layer_norm_eps",
    tied={"embed_out.weight": "gpt_neox.embed_in.weight"},
    rules=(Rule("hidden_size % num_attention_heads == 0", "the head width is hidden_size / num_attention_heads"),),
    defaults={"tie_word_embeddings": False, "attention_bias": True, "initializer_range": 0.02},
    kept={
        "hidden_act": "acts on each ffn neuron alone",
        "layer_norm_eps": "statistics of hidden are unchanged, or it is changed with them (stream_scale)",
        "use_parallel_residual": "both orders of the residual sum keep every axis",
        "rope_parameters": "rotates within a head, whose width is unchanged",
        "rope_scaling": "rotates within a head, whose width is unchanged",
        "rope_theta": "rotates within a head, whose width is unchanged",
        "rotary_pct": "rotates within a head, whose width is unchanged",
        "rotary_emb_base": "rotates within a head, whose width is unchanged",
        "partial_rotary_factor": "rotates within a head, whose width is unchanged",
        "max_position_embeddings": "rotary positions have no weights",
        "hidden_dropout": "training only",
        "classifier_dropout": "training only",
        "is_decoder": "not read by the causal model",
    },
    dropped={
        "gpt_neox.layers.{layer}.attention.bias": "the causal mask, which transformers computes",
        "gpt_neox.layers.{layer}.attention.masked_bias": "a constant of the causal mask",
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq": "a buffer that transformers computes",
    },
)
