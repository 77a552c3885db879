"""Experts whose rows the fused kernels of transformers do not take: it loads such a model, and fails once it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from anysize.config import SourceConfig
from anysize.io.reader import TensorSource
from anysize.recipe import BYTES, Options
from anysize.target import Target, nearest_legal
from anysize.tensor_recipes import DTYPES
from anysize.tensors import expected_tensors

# The rows of an expert's matrices are as long as these axes, and have to begin at multiples of so many bytes.
_ROWS = {"hidden": "hidden_size", "ffn": "intermediate_size"}
_BYTES = 16


def odd_rows(
    config: SourceConfig,
    target: Target,
    request: Mapping[str, int],
    options: Options,
    tensors: TensorSource,
    names: Mapping[str, str],
    check: Callable[[Target], object],
) -> list[str]:
    """Return a note where experts are no longer stored as the kernels want them, with the nearest sizes that are.

    names: where each tensor of the table lies in the file. check: see `resolve_or_suggest`.
    """
    if "expert" not in config.sizes:
        return []
    stored = {
        tensors.tensors[names[name]].dtype for name, e in expected_tensors(config).items() if e.expert is not None
    }
    # With more than one type the narrowest asks for most.
    before = min(BYTES[dtype] for dtype in stored)
    after = BYTES[dtype] if (dtype := DTYPES[options.dtype]) else before
    odd = [axis for axis in _ROWS if target.sizes[axis] * after % _BYTES]
    if not odd or any(config.sizes[axis] * before % _BYTES for axis in _ROWS):
        return []
    found: list[str] = []
    for axis in odd:
        near = nearest_legal(config, request, _ROWS[axis], check, size=target.sizes[axis], step=_BYTES // after)
        found += [f"{_ROWS[axis]} {' or '.join(map(str, near))}"] if near else []
    sizes = " and ".join(f"{_ROWS[axis]} {target.sizes[axis]}" for axis in odd)
    needless = f", and {' with '.join(found)} needs nothing" if found else ""
    return [
        f"{sizes}: rows of the experts are no multiples of {_BYTES} bytes, as the kernels that transformers runs "
        "experts with by default want them, so a model loaded with plain from_pretrained fails when it is called; "
        f'model.set_experts_implementation("eager") runs it{needless}'
    ]
