"""Tiny seeded sources of every family and variant, as tensors in memory under their names on disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from anysize.arch import table
from anysize.io.models import NamedTensors, build_model, config_of, disk_tensors, model_class, quiet_transformers
from anysize.proof.miniature import random_weights

VOCAB = 31
_GROUPED = {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 6}
_WITH_HEAD = {**_GROUPED, "head_dim": 8}
_GEMMA = {**_WITH_HEAD, "num_key_value_heads": 3, "sliding_window": 5, "query_pre_attn_scalar": 7}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _WITH_HEAD,
    "mistral": {**_WITH_HEAD, "sliding_window": 5},
    "qwen2": _GROUPED,
    "qwen3": _WITH_HEAD,
    "gemma": {**_WITH_HEAD, "num_key_value_heads": 3},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo": {**_GROUPED, "clip_qkv": 2.0},
    "olmo2": _GROUPED,
    "phi3": {**_GROUPED, "pad_token_id": 0},
    "mixtral": {**_WITH_HEAD, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 5},
    "olmoe": {**_GROUPED, "num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 2.0},
    "qwen3_moe": {**_WITH_HEAD, "moe_intermediate_size": 29, "num_local_experts": 5, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 24, "n_inner": 29, "n_layer": 2, "n_head": 3, "n_positions": 19},
    "gpt_neox": {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 3,
                 "rotary_pct": 0.5},
    "opt": {"hidden_size": 24, "ffn_dim": 29, "num_hidden_layers": 2, "num_attention_heads": 3,
            "word_embed_proj_dim": 24, "max_position_embeddings": 19},
    "vit": {"hidden_size": 24, "intermediate_size": 29, "num_hidden_layers": 2, "num_attention_heads": 3,
            "image_size": 12, "patch_size": 4, "num_labels": 7},
}  # fmt: skip
_KV_HEADS = {"MHA": 6, "GQA": 3, "MQA": 1}


@dataclass(frozen=True)
class Variant:
    """One family with its flags; `name` is what pytest shows."""

    family: str
    name: str
    flags: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.family}-{self.name}"

    @property
    def tied(self) -> bool:
        return bool(self.flags.get("tie_word_embeddings"))


def _variants_of(family: str) -> list[Variant]:
    if table(family).modality == "image":
        return [Variant(family, "bias"), Variant(family, "no-qkv-bias", {"qkv_bias": False})]
    heads = _KV_HEADS if "num_attention_heads" in _FAMILIES[family] and "kv" in table(family).keys else {"": None}
    found = [
        Variant(
            family,
            "-".join(filter(None, [kind, "tied" if tied else "untied"])),
            {"tie_word_embeddings": tied} | ({} if count is None else {"num_key_value_heads": count}),
        )
        for kind, count in heads.items()
        for tied in (True, False)
    ]
    handled = table(family).handled_keys
    for flag in ("attention_bias", "mlp_bias", "enable_bias", "layer_norm_elementwise_affine"):
        if flag in handled:
            value = not table(family).defaults[flag]
            more = {"num_key_value_heads": 3} if "kv" in table(family).keys else {}
            found.append(Variant(family, f"{flag}={value}", {flag: value, "tie_word_embeddings": False, **more}))
    return found


VARIANTS = [variant for family in _FAMILIES for variant in _variants_of(family)] + [
    Variant("opt", "350m", {"word_embed_proj_dim": 11, "do_layer_norm_before": False, "tie_word_embeddings": True}),
    Variant("opt", "projected", {"word_embed_proj_dim": 11, "tie_word_embeddings": True}),
    Variant("opt", "no-final-norm", {"_remove_final_layer_norm": True, "tie_word_embeddings": False}),
    Variant("gpt2", "fixed-scale", {"scale_attn_weights": False, "tie_word_embeddings": True}),
    Variant("gpt2", "default-ffn", {"n_inner": None, "tie_word_embeddings": True}),
    Variant("gpt_neox", "serial", {"use_parallel_residual": False, "tie_word_embeddings": False}),
]


def config(variant: Variant) -> dict[str, Any]:
    """The variant's full config, as transformers would save it."""
    raw = {"model_type": variant.family, **_FAMILIES[variant.family], **variant.flags}
    raw["architectures"] = [table(variant.family).classes[0]]
    if table(variant.family).modality == "text":
        raw |= {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None}
    raw.setdefault("pad_token_id", None if variant.family != "opt" else 1)
    with quiet_transformers():
        full = config_of(raw).to_dict()
    return {key: value for key, value in {**full, **raw}.items() if key not in ("rotary_pct",)}


def model(variant: Variant, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """A model of the variant with weights in which every mistake shows."""
    with quiet_transformers():
        made = model_class(table(variant.family).classes[0])._from_config(config_of(config(variant)), dtype=dtype)
    random_weights(made, seed)
    return made.eval()


def source(variant: Variant, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> NamedTensors:
    """The same as a source of tensors."""
    return NamedTensors(config(variant), disk_tensors(model(variant, dtype=dtype, seed=seed)))


def inputs(variant: Variant, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Seeded inputs of the variant's modality."""
    generator = torch.Generator().manual_seed(1)
    if table(variant.family).modality == "image":
        return {"pixel_values": torch.randn((2, 3, 12, 12), generator=generator, dtype=dtype)}
    return {"input_ids": torch.randint(0, VOCAB, (2, 17), generator=generator)}


def logits(raw: Any, tensors: dict[str, torch.Tensor], given: dict[str, torch.Tensor]) -> torch.Tensor:
    """The logits of a stock model with these weights, in float32 as users run it."""
    built = build_model(raw["architectures"][0], raw, tensors, torch.float32)
    with torch.no_grad():
        return built(**{k: v.float() if v.is_floating_point() else v for k, v in given.items()}).logits
