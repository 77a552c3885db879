"""Principal directions of the residual stream: the subspace whose loss its readers feel least.

Plain principal directions keep what is large in the stream. What matters is what is read of it: with E[x x^T] = M and
all readers stacked into A, the best m functionals for a linear map that is fitted again afterwards are the leading
right singular vectors of A M^1/2, taken back through M^-1/2 (reduced-rank regression; Izenman 1975). One subspace
serves every reader, so each norm counts alike, and the head as much as all layers together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from anysize.devices import device_for_algebra

# Below this share of the largest variance a direction does not vary.
_NOISE = 1e-8


def reading_metric(read: Iterable[tuple[str, torch.Tensor, torch.Tensor]], head: str) -> torch.Tensor:
    """Return float64 [n, n]: how much a unit of each direction changes what is read, averaged over the norms.

    `read` gives, for each norm, its name, W^T W of what reads its output before its gain, and the second moment there.
    Every norm is scaled to the same whole, so that wide readers do not drown narrow ones; `head` counts as much as all
    others.
    """
    inside: torch.Tensor | float = 0.0
    last: torch.Tensor | float = 0.0
    count = 0
    for site, gram, moments in read:
        share = gram / (gram * moments).sum().clamp(min=1e-30)
        if site == head:
            last = share
        else:
            inside, count = inside + share, count + 1
    total = inside / max(1, count) + last
    assert isinstance(total, torch.Tensor)
    return total


def directions(moments: torch.Tensor, size: int, *, centred: bool, metric: torch.Tensor | None = None) -> torch.Tensor:
    """Return R, float64 [size, n] with orthonormal rows: the directions to keep, the most important first.

    `metric` says what a change of each direction costs; without it all cost the same. `centred` (LayerNorm): the mean
    over coordinates is taken out, and the result lies where coordinates add up to zero, which leaves size - 1.
    """
    home, there = moments.device, device_for_algebra(len(moments))
    moments = moments.to(there)
    if centred:
        # What was measured in single precision has its mean taken out only nearly.
        moments = moments - moments.mean(0, keepdim=True)
        moments = moments - moments.mean(1, keepdim=True)
    variances, vectors = torch.linalg.eigh(moments)
    # The all-ones direction has no variance after centring: it is the last of all and never among the kept.
    count = size - 1 if centred else size
    if metric is None or count >= int((variances > _NOISE * variances[-1]).sum()):
        kept = vectors.flip(1)[:, :count]
    else:
        spread = variances.clamp(min=0).sqrt()
        inverse = torch.where(variances > _NOISE * variances[-1], spread.clamp(min=1e-30).reciprocal(), 0.0)
        # No more matrices at a time than `device_for_algebra` makes room for.
        del moments
        root = vectors * spread @ vectors.T
        inside = root @ metric.to(there) @ root
        del root
        _, important = torch.linalg.eigh(inside)
        kept, _ = torch.linalg.qr(vectors * inverse @ vectors.T @ important.flip(1)[:, :count])
    rows = kept.T.to(home)
    return _zero_sum_basis(size) @ rows if centred else rows.contiguous()


def _zero_sum_basis(size: int) -> torch.Tensor:
    """Return float64 [size, size - 1], orthonormal columns that each add up to zero."""
    eye = torch.eye(size, dtype=torch.float64)
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([ones, eye[:, : size - 1]], 1))
    return basis[:, 1:]
