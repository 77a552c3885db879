"""Floating-point operations of a model, counted as the field does: two for each weight of a product and attention."""

from __future__ import annotations

from anysize.calibration.leave_one_out import NUM_SEQUENCES
from anysize.config import SourceConfig
from anysize.layers import EVOLUTIONARY
from anysize.recipe import Options
from anysize.sequential import most_items, target_passes
from anysize.tensors import num_parameters


def forward_flops(config: SourceConfig, length: int) -> float:
    """Return the operations of a forward pass for one token of a sequence of this length (for one image).

    2 N + 4 L T H d: N without an embedding that is only looked up, T tokens of which all are attended to, H heads of
    width d in each of L layers (Kaplan et al. 2020, appendix B; Chowdhery et al. 2022, appendix B). Of experts, those
    that a token goes to count.
    """
    sizes = config.sizes
    weights = num_parameters(config)
    if "vocab" in sizes and not config.tied:
        weights -= sizes["vocab"] * sizes["hidden"]
    if "expert" in sizes:
        active = int(config.full.get("num_experts_per_tok") or sizes["expert"])
        weights -= sizes["layer"] * (sizes["expert"] - active) * 3 * sizes["hidden"] * sizes["ffn"]
    heads = sizes["kv"] * sizes["group"] * sizes["head"]
    if config.architecture.modality == "image":
        length = (config.full["image_size"] // config.full["patch_size"]) ** 2 + 1
        return length * (2.0 * weights + 4.0 * sizes["layer"] * length * heads)
    return 2.0 * weights + 4.0 * sizes["layer"] * length * heads


def conversion_flops(source: SourceConfig, target: SourceConfig, options: Options, tokens: int, length: int) -> float:
    """Return the operations of models that run while a target is made: where layers are searched, and where readers
    follow the target (see `sequential`); fits themselves are not counted.

    tokens: of the calibration (images for an image model).
    """
    found = 0.0
    if options.layers == EVOLUTIONARY:
        found += options.search_tokens * forward_flops(source, length)
    if options.readers == "sequential":
        passes = target_passes(target) * forward_flops(target, length)
        found += min(tokens, most_items(source)) * (forward_flops(source, length) + passes)
    return found


def leave_one_out_flops(source: SourceConfig, tokens: int, length: int) -> float:
    """Return the operations of the loss without each layer, and with all of them.

    tokens: of the calibration (images for an image model), in sequences of so many.
    """
    most = NUM_SEQUENCES * (1 if source.architecture.modality == "image" else length)
    return (source.sizes["layer"] + 1) * min(tokens, most) * forward_flops(source, length)


def training_flops(config: SourceConfig, length: int) -> float:
    """Return the operations of training on one token (or image): the backward pass costs twice the forward pass."""
    return 3.0 * forward_flops(config, length)
