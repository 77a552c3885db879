"""Shares, noise and fresh values: everything random, seeded per tensor and block, the same in any order of work.

Streams come from numpy's SFC64 through SeedSequence, keyed by (seed, tensor name, block), so that a replay, a
resumed run, another shard size or another number of threads gives the same bytes.
"""

from __future__ import annotations

import hashlib
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

_ROW_BLOCK_ITEMS = 1 << 20


def rows_per_block(num_columns: int) -> int:
    """Return how many rows share one random stream: a function of the width alone, never of memory or threads."""
    return max(1, _ROW_BLOCK_ITEMS // max(1, num_columns))


def stream(seed: int, name: str, block: int) -> np.random.Generator:
    """Return the random stream of one block of rows of one target tensor."""
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    words = np.frombuffer(digest, np.uint32).tolist()
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, block, *words])))


def _raw_words(count: int, generator: np.random.Generator) -> NDArray[np.uint64]:
    return generator.integers(0, 2**64, size=count, dtype=np.uint64)


def _uniform(shape: tuple[int, ...], dtype: torch.dtype, generator: np.random.Generator) -> torch.Tensor:
    """Return values strictly inside (0, 1), as fine as half precision or single precision can use."""
    count = int(np.prod(shape))
    if dtype in (torch.bfloat16, torch.float16):
        raw = _raw_words(-(-count // 8), generator).view(np.uint8)[:count]
        # bfloat16 has nothing between 255/256 and 1: the outermost of the 256 steps would leave one share nothing.
        edge = 1 / 256
        return torch.from_numpy(raw).to(dtype).mul_(edge).add_(edge / 2).clamp_(edge, 1 - edge).reshape(shape)
    raw = _raw_words(-(-count // 4), generator).view(np.int16)[:count]
    return torch.from_numpy(raw).to(dtype).add_(32768.5).mul_(1 / 65536).reshape(shape)


def random_shares(values: torch.Tensor, num_copies: int, generator: np.random.Generator) -> list[torch.Tensor]:
    """Return `num_copies` tensors that add up to `values` exactly, in their own precision.

    Each element's shares are a uniform draw from the simplex (stick breaking). Subtracting twice makes the split
    free of rounding (Sterbenz): rest = v - fl(s v), share = v - rest.
    """
    shares: list[torch.Tensor] = []
    rest = values
    for left in range(num_copies - 1, 0, -1):
        draw = _uniform(tuple(values.shape), values.dtype, generator)
        first = rest * (draw if left == 1 else 1 - draw.pow(1 / left))
        remaining = rest - first
        shares.append(rest - remaining)
        rest = remaining
    return [*shares, rest]


def paired_noise(copies: list[torch.Tensor], std: float, generator: np.random.Generator) -> list[torch.Tensor]:
    """Add noise of standard deviation `std` to each pair of copies with opposite signs; an odd last copy stays clean.

    Source: HyperCloning (2409.12903, figure 4) and its public code.
    """
    noisy = list(copies)
    for pair in range(0, len(copies) - 1, 2):
        shape = tuple(copies[pair].shape)
        noise = normal(shape, std, copies[pair].dtype, generator)
        noisy[pair] = copies[pair] + noise
        noisy[pair + 1] = copies[pair + 1] - noise
    return noisy


@cache
def _normal_quantiles() -> NDArray[np.float32]:
    """Return float32 [65536]: the normal distribution's quantiles at equal steps, scaled to unit variance.

    Drawing from a table costs a tenth of drawing normals, and gives the same bits with every version of numpy.
    """
    steps = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    quantiles = torch.special.ndtri(steps)
    return (quantiles / quantiles.square().mean().sqrt()).to(torch.float32).numpy()


def normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, generator: np.random.Generator) -> torch.Tensor:
    """Return normal values of standard deviation `std`, none beyond 4.2 of them."""
    count = int(np.prod(shape))
    draw = _raw_words(-(-count // 4), generator).view(np.uint16)[:count]
    return torch.from_numpy(_normal_quantiles().take(draw)).mul_(std).to(dtype).reshape(shape)


def rms(values: torch.Tensor) -> float:
    """Return the root mean square, to six digits so that summation order cannot change a replay's bytes.

    NaN and Inf, where they are allowed at all, count as zero: one bad weight must not drown all others in noise.
    """
    flat, total, count = values.reshape(-1), 0.0, values.numel()
    for start in range(0, count, _ROW_BLOCK_ITEMS):
        block = flat[start : start + _ROW_BLOCK_ITEMS].to(torch.float64).nan_to_num(0.0, 0.0, 0.0).numpy()
        total += float(np.sum(block * block))
    return float(f"{(total / max(count, 1)) ** 0.5:.6g}")
