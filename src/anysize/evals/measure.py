"""Loss, KL(source || model) and agreement, added up row by row; a row is a predicted token or an image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from anysize.errors import InputError

# Log-probabilities over a vocabulary are the largest thing in memory: so many numbers of them at a time.
_LARGEST = 1 << 25


@dataclass
class Sums:
    """Sums over rows, in double precision; divided by `rows` they are the figures of an evaluation."""

    rows: int = 0
    nats: float = 0.0
    right: int = 0
    source_nats: float = 0.0
    source_right: int = 0
    kl: float = 0.0
    agree: int = 0

    @torch.no_grad()
    def add(self, logits: torch.Tensor, targets: torch.Tensor, source: torch.Tensor | None = None) -> None:
        """Add rows of logits [rows, classes] with their targets [rows], and the source's logits of the same rows.

        The model may have more classes than the source, never fewer. Raises InputError where a figure is not finite.
        """
        targets = targets.to(logits.device)
        count = max(1, _LARGEST // logits.shape[-1])
        for at in range(0, len(targets), count):
            part = slice(at, at + count)
            self._add(logits[part], targets[part], None if source is None else source[part].to(logits.device))

    def _add(self, logits: torch.Tensor, targets: torch.Tensor, source: torch.Tensor | None) -> None:
        q, best = logits.float().log_softmax(-1), logits.argmax(-1)
        self.rows += len(targets)
        self.nats += finite(-_at(q, targets), "the model's loss")
        self.right += int((best == targets).sum())
        if source is None:
            return
        p, source_best = source.float().log_softmax(-1), source.argmax(-1)
        self.source_nats += finite(-_at(p, targets), "the source's loss")
        self.source_right += int((source_best == targets).sum())
        self.kl += finite((p.exp() * (p - q[..., : p.shape[-1]])).sum(dtype=torch.float64), "the divergence")
        self.agree += int((source_best == best).sum())


def _at(log_probabilities: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return log_probabilities.gather(-1, targets[:, None]).sum(dtype=torch.float64)


def finite(figure: torch.Tensor | float, what: str) -> float:
    """Return a figure as a number; raise InputError where it is NaN or infinite."""
    value = float(figure)
    if not math.isfinite(value):
        raise InputError(f"{what} is {value} on these data: weights hold NaN or Inf, or the dtype overflows")
    return value
