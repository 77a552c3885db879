"""Distillation: how far a student's distribution is from its teacher's, in nats per token (or image).

    KL(p || q) at temperature T = sum p_T (log p_T - log q_T),  p_T = softmax(teacher logits / T)

The loss is (1 - weight) x plain loss + weight x T^2 x KL: T^2 keeps the size of the gradient (Hinton et al. 2015). With
`top_k`, the teacher's largest k probabilities stand one by one and all the rest as one: a KL of coarser distributions,
never larger than the whole one.
"""

from __future__ import annotations

import math

import torch


def kl_divergence(teacher: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean KL(teacher || student) of logits [..., classes], in nats per row; gradient to both."""
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()


def top_targets(teacher: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k likeliest classes and their log-probabilities at a temperature: int64, float32 [..., k]."""
    logs = (teacher.float() / temperature).log_softmax(-1)
    values, classes = logs.topk(min(k, logs.shape[-1]), dim=-1)
    return classes, values


def _rest(logs: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of what probabilities leave of 1: [..., k] -> [...]."""
    # Rounding may carry a sum past 1, where nothing is left.
    total = logs.logsumexp(-1).clamp(max=-1e-7)
    return torch.log(-torch.expm1(total))


def kl_of_top(classes: torch.Tensor, logs: torch.Tensor, student: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean KL between distributions of k + 1 classes: the teacher's k likeliest, and the rest as one.

    classes, logs: of `top_targets`. student: logits [..., classes]; gradient to them. The result is in nats per row.
    """
    q = (student.float() / temperature).log_softmax(-1)
    chosen = q.gather(-1, classes)
    found = (logs.exp() * (logs - chosen)).sum(-1)
    if classes.shape[-1] < student.shape[-1]:
        rest, left = _rest(logs), _rest(chosen)
        found = found + rest.exp() * (rest - left)
    return found.mean()


def distilled(plain: torch.Tensor, kl: torch.Tensor, weight: float, temperature: float) -> torch.Tensor:
    """Return the loss that is trained on."""
    return (1 - weight) * plain + weight * temperature**2 * kl


def stream_distance(student: torch.Tensor, teacher: torch.Tensor, writer: torch.Tensor) -> torch.Tensor:
    """Return how far the student's residual stream is from what the writer map makes of the teacher's, relative.

    student: [..., m]. teacher: [..., n]. writer: [m, n]. 0 where the target computes what the source does.
    """
    wanted = teacher.float() @ writer.float().T
    return (student.float() - wanted).square().sum() / wanted.square().sum().clamp(min=math.ulp(1.0))
