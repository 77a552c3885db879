"""How far the answers of two models are apart."""

from __future__ import annotations

import torch


def _shared(wanted: torch.Tensor, got: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns = min(wanted.shape[-1], got.shape[-1])
    return wanted[..., :columns].double(), got[..., :columns].double()


def logit_error(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Return max |difference| / std of the wanted logits, over the tokens or labels that both models have."""
    wanted, got = _shared(wanted, got)
    return float((wanted - got).abs().max() / wanted.std())


def kl_nats(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """Return KL(source || target) in nats per token (or image): averaged over positions, never over the vocabulary."""
    wanted, got = _shared(wanted, got)
    log_p, log_q = wanted.log_softmax(-1), got.log_softmax(-1)
    found = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    # What is not defined is not equal; only rounding can make an average of KLs negative.
    return max(0.0, found) if found == found else float("inf")
