"""Floating-point operations of what comes before training: calibration, and models that run while a target is made."""

from __future__ import annotations

from anysize.calibration.leave_one_out import NUM_SEQUENCES
from anysize.config import SourceConfig
from anysize.flops import forward_flops
from anysize.layers import EVOLUTIONARY
from anysize.recipe import Options
from anysize.sequential import most_items, target_passes


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
