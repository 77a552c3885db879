"""Which heads or neurons cost least to remove when what reads them is fitted again: choice and readers, jointly.

With readers W and the second moment M of what they read, H = M^-1: removing a block B and refitting the rest changes
what is read by tr(W_B (H_BB)^-1 W_B^T), and the rest becomes W - W_B (H_BB)^-1 H_B. Blocks go greedily. Source: optimal
brain surgeon (Hassibi and Stork, 1993), for structures ZipLM (2302.04089).
"""

from __future__ import annotations

import torch

# Added to the diagonal of a second moment before it is inverted, as a share of its mean.
RIDGE = 1e-3
# Removals in one round: exact one by one up to so many, then the cheapest few at once.
_ROUNDS = 256


def kept_blocks(
    weight: torch.Tensor, moments: torch.Tensor, blocks: torch.Tensor, size: int, ridge: float = RIDGE
) -> list[int]:
    """Return the `size` blocks that stay, in their old order.

    weight: float64 [out, n]; moments: float64 [n, n]; blocks: int64 [number of blocks, channels of a block], disjoint.
    """
    damped = moments + ridge * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    inverse, weight = torch.linalg.inv(damped), weight.clone()
    staying = torch.arange(len(blocks))
    at_once = -(-(len(blocks) - size) // _ROUNDS)
    while len(staying) > size:
        here = blocks[staying]
        readers = weight[:, here].permute(1, 0, 2)
        inside = inverse[here[:, :, None], here[:, None, :]]
        costs = (readers @ torch.linalg.inv(inside) * readers).sum((1, 2))
        number = min(at_once, len(staying) - size)
        gone = torch.argsort(costs, descending=False, stable=True)[:number]
        channels = here[gone].flatten()
        taken_over = torch.linalg.solve(inverse[channels][:, channels], inverse[channels])
        weight -= weight[:, channels] @ taken_over
        inverse -= inverse[:, channels] @ taken_over
        stays = torch.ones(len(staying), dtype=torch.bool)
        stays[gone] = False
        staying = staying[stays]
    return staying.tolist()
