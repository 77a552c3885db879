"""Whether a model is still the one that a plan was made for."""

from __future__ import annotations

from anysize.io.reader import TensorSource
from anysize.recipe import Source

WEIGHTS = "weights"


def changes_since(planned: Source, tensors: TensorSource) -> list[str]:
    """Return what of a model is other than in the source of a plan, in words; weights only where the plan read some."""
    found = {
        "config": (tensors.config_sha256, planned.config_sha256),
        "tensor headers": (tensors.headers_sha256, planned.headers_sha256),
    }
    changed = [what for what, (now, then) in found.items() if now != then]
    # Of weights under another config or of other shapes nothing more has to be said.
    if changed or not planned.weights_sha256:
        return changed
    from anysize.calibration.scores import model_sha256  # noqa: PLC0415 - it needs torch

    return [] if model_sha256(tensors) == planned.weights_sha256 else [WEIGHTS]
