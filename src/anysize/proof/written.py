"""Whether what lies in a folder is still what was written there: digests of rows of every tensor.

Where every number is a sum that the source and the plan tell, `algebra` says more; where matrices were fitted, these
do not travel with the folder, and this is what is left.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from math import prod

import torch

from anysize.proof.algebra import ReadRows
from anysize.proof.verdict import Check
from anysize.recipe import Plan

# Of a tensor of more numbers than the second, so many rows, from the first to the last.
_ROWS, _WHOLE = 16, 1 << 14


def digests_of(plan: Plan, read: ReadRows) -> dict[str, str]:
    """Return a digest of rows of every tensor that a plan makes, by its name; 32 hexadecimal digits each."""
    return {recipe.name: _digest(read, recipe.name, recipe.shape) for recipe in plan.recipes}


def _digest(read: ReadRows, name: str, shape: tuple[int, ...], *, wrong: bool = False) -> str:
    count = shape[0] if shape else 1
    rows = sorted({i * (count - 1) // (_ROWS - 1) for i in range(_ROWS)})
    whole = prod(shape) <= _WHOLE
    found = hashlib.sha256()
    for part in [read(name, 0, count)] if whole else (read(name, row, 1) for row in rows):
        values = part.reshape(-1).contiguous().view(torch.uint8).clone()
        # One bit of the first number.
        values[0] ^= int(wrong)
        found.update(values.numpy().data)
    return found.hexdigest()[:32]


def check_digests(plan: Plan, read: ReadRows, known: Mapping[str, str]) -> Check:
    """Count the tensors that are not what was written, by the digests that were kept.

    The control changes one bit of each.
    """

    def differ(*, wrong: bool = False) -> float:
        return float(sum(_digest(read, r.name, r.shape, wrong=wrong) != known.get(r.name) for r in plan.recipes))

    return Check(
        name="written", what=f"rows of each of {len(plan.recipes)} tensors against those that were written",
        unit="tensors that differ", measured=differ(), tolerance=0.0, control=differ(wrong=True),
    )  # fmt: skip
