"""GPT-2: LayerNorm, learned positions, weights stored in x out, fused queries, keys and values."""

from anysize.arch.schema import Architecture, Norm, Parameter, Rule

PRE_NORM = Norm("layer", "hidden", "norm(hidden)", bias="True")

ARCHITECTURE = Architecture(
    model_type="gpt2",
    classes=("GPT2LMHeadModel",),
    axes={
        "vocab": "vocab_size",
        "hidden": "n_embd",
        "ffn": "n_inner or 4 * n_embd",
        "kv": "n_head",
        "group": "1",
        "head": "n_embd // n_head",
        "layer": "n_layer",
        "position": "n_positions",
    },
    keys={"vocab": "vocab_size", "hidden": "n_embd", "ffn": "n_inner", "heads": "n_head", "layer": "n_layer"},
    base="transformer",
    rotary=False,
    parameters={
        "transformer.wte.weight": Parameter("vocab -> hidden, stored in x out"),
        "transformer.wpe.weight": Parameter("position -> hidden, stored in x out"),
        "transformer.h.{layer}.attn.c_attn.weight": Parameter(
            "norm(hidden) -> (kv query(head)) + (kv key(head)) + (kv head), stored in x out"
        ),
        "transformer.h.{layer}.attn.c_attn.bias": Parameter("-> (kv query(head)) + (kv key(head)) + (kv head)"),
        "transformer.h.{layer}.attn.c_proj.weight": Parameter("(kv head) -> hidden, stored in x out"),
        "transformer.h.{layer}.attn.c_proj.bias": Parameter("-> hidden"),
        "transformer.h.{layer}.mlp.c_fc.weight": Parameter("norm(hidden) -> ffn, stored in x out"),
        "transformer.h.{layer}.mlp.c_fc.bias": Parameter("-> ffn"),
        "transformer.h.{layer}.mlp.c_proj.weight": Parameter("ffn -> hidden, stored in x out"),
        "transformer.h.{layer}.mlp.c_proj.bias": Parameter("-> hidden"),
        "lm_head.weight": Parameter("norm(hidden) -> vocab"),
    },
    norms={
        "transformer.h.{layer}.ln_1": PRE_NORM,
        "transformer.h.{layer}.ln_2": PRE_NORM,
        "transformer.ln_f": PRE_NORM,
    },
    final_norm="transformer.ln_f",
    stream_eps="layer_norm_epsilon",
    tied={"lm_head.weight": "transformer.wte.weight"},
    rules=(Rule("n_embd % n_head == 0", "the head width is hidden_size / num_attention_heads"),),
    refused=(
        Rule("not add_cross_attention", "cross-attention reads another model's hidden axis"),
        Rule("n_inner != 0", "a feed-forward block has neurons"),
    ),
    defaults={
        "tie_word_embeddings": True,
        "n_inner": None,
        "n_positions": 1024,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "initializer_range": 0.02,
    },
    depth_locked={"scale_attn_by_inverse_layer_idx": "scores are divided by the layer's number, which would change"},
    fixed_score_scale="not scale_attn_weights",
    kept={
        "activation_function": "acts on each ffn neuron alone",
        "layer_norm_epsilon": "statistics of hidden are unchanged, or it is changed with them (stream_scale)",
        "resid_pdrop": "training only",
        "embd_pdrop": "training only",
        "attn_pdrop": "training only",
        "n_ctx": "an older name of n_positions",
        "n_special": "special tokens of an older tokenizer",
        "predict_special_tokens": "training only",
        "output_past": "an older name of use_cache",
        "reorder_and_upcast_attn": "order of multiplication only",
        "summary_type": "read by heads of other classes only",
        "summary_use_proj": "read by heads of other classes only",
        "summary_activation": "read by heads of other classes only",
        "summary_proj_to_labels": "read by heads of other classes only",
        "summary_first_dropout": "read by heads of other classes only",
    },
    dropped={
        "transformer.h.{layer}.attn.bias": "the causal mask, which transformers computes",
        "transformer.h.{layer}.attn.masked_bias": "a constant of the causal mask",
    },
)
