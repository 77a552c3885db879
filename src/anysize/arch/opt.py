"""OPT: LayerNorm, learned positions; the 350m layout projects embeddings in and out and norms after each sum."""

from anysize.arch.schema import Architecture, Norm, Parameter, Rule

PROJECTED = "word_embed_proj_dim != hidden_size"
WHOLE = "word_embed_proj_dim == hidden_size"
FINAL_NORM = "do_layer_norm_before and not _remove_final_layer_norm"
NO_FINAL_NORM = "not do_layer_norm_before or _remove_final_layer_norm"
LAYER_NORM = Norm(
    "layer",
    "hidden",
    "norm(hidden)",
    stored="layer_norm_elementwise_affine",
    bias="layer_norm_elementwise_affine",
    after_sum="not do_layer_norm_before",
)

ARCHITECTURE = Architecture(
    model_type="opt",
    classes=("OPTForCausalLM",),
    axes={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "ffn_dim",
        "kv": "num_attention_heads",
        "group": "1",
        "head": "hidden_size // num_attention_heads",
        "layer": "num_hidden_layers",
        "position": "max_position_embeddings + 2",
        "embed": "word_embed_proj_dim",
    },
    keys={
        "vocab": "vocab_size",
        "hidden": "hidden_size",
        "ffn": "ffn_dim",
        "heads": "num_attention_heads",
        "layer": "num_hidden_layers",
    },
    base="model",
    rotary=False,
    parameters={
        "model.decoder.embed_tokens.weight": Parameter("vocab -> hidden, stored in x out", WHOLE),
        "model.decoder.embed_tokens.weight|projected": Parameter("vocab -> embed, stored in x out", PROJECTED),
        "model.decoder.project_in.weight": Parameter("embed -> hidden", PROJECTED),
        "model.decoder.project_out.weight": Parameter("norm(hidden) -> embed", f"{PROJECTED} and ({FINAL_NORM})"),
        "model.decoder.project_out.weight|raw": Parameter("hidden -> embed", f"{PROJECTED} and ({NO_FINAL_NORM})"),
        "model.decoder.embed_positions.weight": Parameter("position -> hidden, stored in x out"),
        "model.decoder.layers.{layer}.self_attn.q_proj.weight": Parameter("norm(hidden) -> (kv query(head))"),
        "model.decoder.layers.{layer}.self_attn.q_proj.bias": Parameter("-> (kv query(head))", "enable_bias"),
        "model.decoder.layers.{layer}.self_attn.k_proj.weight": Parameter("norm(hidden) -> (kv key(head))"),
        "model.decoder.layers.{layer}.self_attn.k_proj.bias": Parameter("-> (kv key(head))", "enable_bias"),
        "model.decoder.layers.{layer}.self_attn.v_proj.weight": Parameter("norm(hidden) -> (kv head)"),
        "model.decoder.layers.{layer}.self_attn.v_proj.bias": Parameter("-> (kv head)", "enable_bias"),
        "model.decoder.layers.{layer}.self_attn.out_proj.weight": Parameter("(kv head) -> hidden"),
        "model.decoder.layers.{layer}.self_attn.out_proj.bias": Parameter("-> hidden", "enable_bias"),
        "model.decoder.layers.{layer}.fc1.weight": Parameter("norm(hidden) -> ffn"),
        "model.decoder.layers.{layer}.fc1.bias": Parameter("-> ffn", "enable_bias"),
        "model.decoder.layers.{layer}.fc2.weight": Parameter("ffn -> hidden"),
        "model.decoder.layers.{layer}.fc2.bias": Parameter("-> hidden", "enable_bias"),
        "lm_head.weight": Parameter("norm(hidden) -> vocab", f"{WHOLE} and ({FINAL_NORM})"),
        "lm_head.weight|raw": Parameter("hidden -> vocab", f"{WHOLE} and ({NO_FINAL_NORM})"),
        "lm_head.weight|projected": Parameter("embed -> vocab", PROJECTED),
    },
    norms={
        "model.decoder.layers.{layer}.self_attn_layer_norm": LAYER_NORM,
        "model.decoder.layers.{layer}.final_layer_norm": LAYER_NORM,
        "model.decoder.final_layer_norm": Norm(
            "layer",
            "hidden",
            "norm(hidden)",
            stored="layer_norm_elementwise_affine",
            bias="layer_norm_elementwise_affine",
            when=FINAL_NORM,
        ),
    },
    final_norm="model.decoder.final_layer_norm",
    tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    rules=(Rule("hidden_size % num_attention_heads == 0", "the head width is hidden_size / num_attention_heads"),),
    follows={"word_embed_proj_dim": "hidden_size"},
    defaults={
        "tie_word_embeddings": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "init_std": 0.02,
        "max_position_embeddings": 2048,
    },
    init_std="init_std",
    kept={
        "activation_function": "acts on each ffn neuron alone",
        "dropout": "training only",
        "activation_dropout": "training only",
        "layerdrop": "training only",
    },
)
