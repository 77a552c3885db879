"""Floating-point operations of a model, counted as the field does: two for each weight of a product and attention."""

from __future__ import annotations

import re

from anysize.config import SourceConfig
from anysize.notation import Arrow
from anysize.tensors import multiplied

# Dense bfloat16 matrix products, in operations a second, as the makers' data sheets have them. What a name has to hold,
# the more particular first.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H200 NVL", 835e12), ("H100", 989e12), ("H200", 989e12),
    ("GH200", 989e12), ("B200", 2250e12), ("A100", 312e12), ("A800", 312e12), ("A40", 149.7e12), ("A30", 165e12),
    ("A10", 125e12), ("L40S", 362e12), ("L4", 121e12), ("RTX A6000", 154.8e12), ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12), ("MI300X", 1307e12), ("MI325X", 1307e12),
)  # fmt: skip
# A part of a device, or another one under the same number.
_OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|SUPER|D)\b", re.IGNORECASE)


def forward_flops(config: SourceConfig, length: int) -> float:
    """Return the operations of a forward pass for one token of a sequence of this length (for one image).

    2 N + 4 L T H d: N weights that are multiplied with (biases, norms and what is looked up are not), T tokens of which
    all are attended to, H heads of width d in each of L layers (Kaplan et al. 2020, appendix B; Chowdhery et al. 2022,
    appendix B). Of experts, those that a token goes to count.
    """
    sizes = config.sizes
    heads = sizes["kv"] * sizes["group"] * sizes["head"]
    if config.architecture.modality == "image":
        places = sizes["position"]
        products = sum(count * _places(arrow, places) for arrow, count in multiplied(config))
        return 2.0 * products + 4.0 * sizes["layer"] * places**2 * heads
    return 2.0 * sum(count for _, count in multiplied(config)) + 4.0 * sizes["layer"] * length * heads


def _places(arrow: Arrow, places: int) -> int:
    """Return at how many places of an image a weight is used: patches have no class token, and it alone has a label."""
    if any("label" in dim.axes for dim in arrow.writes):
        return 1
    return places - 1 if any("patch" in dim.axes for dim in arrow.reads) else places


def training_flops(config: SourceConfig, length: int) -> float:
    """Return the operations of training on one token (or image): the backward pass costs twice the forward pass."""
    return 3.0 * forward_flops(config, length)


def peak_flops(device: str) -> float | None:
    """Return the dense bfloat16 operations a second that a device of this name can do; None where nobody has told us.

    What a run does of them is its model FLOPs utilization (Chowdhery et al. 2022, 2204.02311, appendix B).
    """
    if _OTHERS.search(device):
        return None
    return next((peak for name, peak in _PEAKS if re.search(rf"\b{name}\b", device)), None)


def flops_a_second(value: float) -> str:
    """Return operations a second as a person reads them."""
    for unit, size in (("T", 1e12), ("G", 1e9)):
        if value >= size:
            return f"{value / size:.3g} {unit}FLOP/s"
    return f"{value / 1e6:.3g} MFLOP/s"
