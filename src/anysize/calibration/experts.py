"""See what goes on inside experts. transformers keeps them fused in one module, so no hook can; its own extension point
for the forward pass of experts can, and costs nothing on top of it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "anysize-watched"
# (fused module, expert, what its last matrix reads [tokens routed there, ffn]).
See = Callable[[torch.nn.Module, int, torch.Tensor], None]


@contextmanager
def watched(model: PreTrainedModel, see: See) -> Generator[None]:
    """While active, the model runs its experts one by one and tells what each makes of the tokens routed to it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: PLC0415

    def forward(module: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for expert in range(module.num_experts):
            tokens, places = torch.where(chosen == expert)
            if not len(tokens):
                continue
            gate, up = linear(hidden[tokens], module.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
            see(module, expert, inner)
            made = linear(inner, module.down_proj[expert]) * weights[tokens, places, None]
            out.index_add_(0, tokens, made.to(out.dtype))
        return out

    before = model.get_experts_implementation()
    ALL_EXPERTS_FUNCTIONS[_NAME] = forward
    try:
        model.set_experts_implementation(_NAME)
        yield
    finally:
        model.set_experts_implementation(before)
        del ALL_EXPERTS_FUNCTIONS[_NAME]


def routing_weights(output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return [tokens, experts]: the weight each expert gets, 0 where not chosen, from (logits, weights, chosen)."""
    logits, weights, chosen = output
    return torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))
