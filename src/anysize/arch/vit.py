"""ViT, image classification: LayerNorm before each branch, learned positions, patches in and labels out."""

from anysize.arch.schema import Architecture, Norm, Parameter, Rule

PRE_NORM = Norm("layer", "hidden", "norm(hidden)", bias="True")

ARCHITECTURE = Architecture(
    model_type="vit",
    classes=("ViTForImageClassification",),
    axes={
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "kv": "num_attention_heads",
        "group": "1",
        "head": "hidden_size // num_attention_heads",
        "layer": "num_hidden_layers",
        "channel": "num_channels",
        "patch": "patch_size",
        "position": "(image_size // patch_size) ** 2 + 1",
        "label": "num_labels",
    },
    keys={
        "hidden": "hidden_size",
        "ffn": "intermediate_size",
        "heads": "num_attention_heads",
        "layer": "num_hidden_layers",
    },
    base="vit",
    rotary=False,
    modality="image",
    parameters={
        "vit.embeddings.cls_token": Parameter("1 1 -> hidden, stored in x out"),
        "vit.embeddings.position_embeddings": Parameter("1 position -> hidden, stored in x out"),
        "vit.embeddings.patch_embeddings.projection.weight": Parameter("channel patch patch -> hidden"),
        "vit.embeddings.patch_embeddings.projection.bias": Parameter("-> hidden"),
        "vit.encoder.layer.{layer}.attention.attention.query.weight": Parameter("norm(hidden) -> (kv query(head))"),
        "vit.encoder.layer.{layer}.attention.attention.query.bias": Parameter("-> (kv query(head))", "qkv_bias"),
        "vit.encoder.layer.{layer}.attention.attention.key.weight": Parameter("norm(hidden) -> (kv key(head))"),
        "vit.encoder.layer.{layer}.attention.attention.key.bias": Parameter("-> (kv key(head))", "qkv_bias"),
        "vit.encoder.layer.{layer}.attention.attention.value.weight": Parameter("norm(hidden) -> (kv head)"),
        "vit.encoder.layer.{layer}.attention.attention.value.bias": Parameter("-> (kv head)", "qkv_bias"),
        "vit.encoder.layer.{layer}.attention.output.dense.weight": Parameter("(kv head) -> hidden"),
        "vit.encoder.layer.{layer}.attention.output.dense.bias": Parameter("-> hidden"),
        "vit.encoder.layer.{layer}.intermediate.dense.weight": Parameter("norm(hidden) -> ffn"),
        "vit.encoder.layer.{layer}.intermediate.dense.bias": Parameter("-> ffn"),
        "vit.encoder.layer.{layer}.output.dense.weight": Parameter("ffn -> hidden"),
        "vit.encoder.layer.{layer}.output.dense.bias": Parameter("-> hidden"),
        "classifier.weight": Parameter("norm(hidden) -> label"),
        "classifier.bias": Parameter("-> label"),
    },
    norms={
        "vit.encoder.layer.{layer}.layernorm_before": PRE_NORM,
        "vit.encoder.layer.{layer}.layernorm_after": PRE_NORM,
        "vit.layernorm": PRE_NORM,
    },
    final_norm="vit.layernorm",
    tied_when="False",
    rules=(Rule("hidden_size % num_attention_heads == 0", "the head width is hidden_size / num_attention_heads"),),
    defaults={"qkv_bias": True, "num_channels": 3, "initializer_range": 0.02},
    kept={
        "hidden_act": "acts on each ffn neuron alone",
        "layer_norm_eps": "statistics of hidden are unchanged",
        "hidden_dropout_prob": "training only",
        "attention_probs_dropout_prob": "training only",
        "encoder_stride": "read by masked image modelling only",
        "pooler_output_size": "the classifier has no pooler",
        "pooler_act": "the classifier has no pooler",
    },
)
