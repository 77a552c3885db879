"""Distillation: how far a student's distribution is from its teacher's, in nats per token (or image).

    KL(p || q) at temperature T = sum p_T (log p_T - log q_T),  p_T = softmax(teacher logits / T)

The loss is (1 - weight) x plain loss + weight x T^2 x KL: T^2 keeps the size of the gradient (Hinton et al. 2015). With
`top_k`, the teacher's largest k probabilities stand one by one and all the rest as one: a KL of coarser distributions,
never larger than the whole one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

# Probabilities over a vocabulary are the largest thing in memory: so many numbers of them at a time.
_LARGEST = 1 << 24


def _parts(logits: torch.Tensor) -> int:
    """Return how many rows of logits are looked at at a time."""
    return max(1, _LARGEST // logits.shape[-1])


def _mean(each: Callable[..., torch.Tensor], *rows: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows of what `each` gives for [rows, ...] tensors, the last of which are logits.

    Where there are many, what it holds on the way is dropped, and made again for the gradient.
    """
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in rows]
    count, size = len(flat[-1]), _parts(flat[-1])
    if count <= size:
        return each(*flat).mean()

    def part(*some: torch.Tensor) -> torch.Tensor:
        return each(*some).sum()

    parts = zip(*(tensor.split(size) for tensor in flat), strict=True)
    sums: list[torch.Tensor] = [checkpoint(part, *some, use_reentrant=False) for some in parts]  # pyright: ignore[reportAssignmentType]
    return torch.stack(sums).sum() / count


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean KL(teacher || student) of logits [..., classes], in nats per row; gradient to both."""

    def each(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        p = (theirs.float() / temperature).log_softmax(-1)
        q = (ours.float() / temperature).log_softmax(-1)
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)

    return _mean(each, teacher, student)


def top_targets(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k likeliest classes and their log-probabilities at a temperature: int64, float32 [..., k]."""
    k = min(k, teacher.shape[-1])
    classes, values = list[torch.Tensor](), list[torch.Tensor]()
    for rows in teacher.reshape(-1, teacher.shape[-1]).split(_parts(teacher)):
        found = (rows.float() / temperature).log_softmax(-1).topk(k, dim=-1)
        classes.append(found.indices)
        values.append(found.values)
    shape = (*teacher.shape[:-1], k)
    return torch.cat(classes).reshape(shape), torch.cat(values).reshape(shape)


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of what probabilities leave of 1: [..., k] -> [...]."""
    # Rounding may carry a sum past 1, where nothing is left.
    total = logs.logsumexp(-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(total))


def kl_of_top(classes: torch.Tensor, logs: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean KL between distributions of k + 1 classes: the teacher's k likeliest, and the rest as one.

    classes, logs: of `top_targets`. student: logits [..., classes]; gradient to them. The result is in nats per row.
    """

    def each(places: torch.Tensor, known: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        chosen = (ours.float() / temperature).log_softmax(-1).gather(-1, places)
        found = (known.exp() * (known - chosen)).sum(-1)
        if places.shape[-1] < ours.shape[-1]:
            rest, left = _rest(known), _rest(chosen)
            found = found + rest.exp() * (rest - left)
        return found

    return _mean(each, classes, logs, student)


def distilled(plain: torch.Tensor, kl: torch.Tensor, weight: float, temperature: float) -> torch.Tensor:
    """Return the loss that is trained on."""
    return (1 - weight) * plain + weight * temperature**2 * kl


def stream_distance(student: torch.Tensor, teacher: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """Return how far the student's residual stream is from what the writer map makes of the teacher's, relative.

    student: [..., m]. teacher: [..., n]. writer: [m, n]. 0 where the target computes what the source does.
    """
    wanted = teacher.float() @ writer.float().T
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp(min=math.ulp(1.0))
