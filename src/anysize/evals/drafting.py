"""What a draft model is worth: how many of its tokens the source accepts, and how much faster the pair generates.

Greedy speculative decoding (Leviathan et al. 2022, 2211.17192; transformers' assisted generation): the draft proposes
some tokens, the source checks them in one pass and keeps those that it would have chosen itself. The text is the
source's own, whatever the draft says.
"""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict

from anysize.errors import InputError
from anysize.io.models import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROUNDS = 3


class Drafting(BaseModel):
    """What was measured on continuations of held-out text.

    acceptance_rate: the share of tokens at which the draft's choice is the source's, both after the source's own text.
    tokens_a_check: that one pass of the source gives on average, with `num_drafted` proposed at a time. speedup: the
    source's own seconds over those of the pair, medians of rounds that alternate. same_text: whether both wrote alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prompts: int
    num_tokens: int
    num_drafted: int
    acceptance_rate: float
    tokens_a_check: float
    source_s: float
    pair_s: float
    speedup: float
    same_text: bool


def accepted(source: torch.Tensor, draft: torch.Tensor, num_drafted: int) -> float:
    """Return how many tokens one check gives on average; both: int64 [tokens], the source's and the draft's choices.

    A check gives the proposals up to the first that is refused, and one token of the source's own.
    """
    agree = (source == draft).tolist()
    place = checks = 0
    while place < len(agree):
        run = 0
        while run < num_drafted and place + run < len(agree) and agree[place + run]:
            run += 1
        place, checks = place + run + 1, checks + 1
    return len(agree) / max(1, checks)


def _written(model: Any, prompts: torch.Tensor, new: int, assistant: Any = None, num_drafted: int = 0) -> torch.Tensor:
    """Return what a model writes after each prompt, one prompt at a time, as assisted generation asks for."""
    rows: list[torch.Tensor] = []
    for prompt in prompts:
        settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False,
                                    "pad_token_id": 0}  # fmt: skip
        if assistant is not None:
            assistant.generation_config.num_assistant_tokens = num_drafted
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            assistant.generation_config.assistant_confidence_threshold = 0.0
            settings["assistant_model"] = assistant
        with quiet_transformers():
            found = model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), **settings)
        rows.append(found[0, len(prompt) :])
    return torch.stack(rows)


@torch.no_grad()
def measure_drafting(
    source: PreTrainedModel,
    draft: PreTrainedModel,
    prompts: torch.Tensor,
    *,
    new_tokens: int = 64,
    num_drafted: int = 5,
) -> Drafting:
    """Return what a draft is worth to its source on prompts, int64 [prompts, tokens]; both models on one device.

    Raises InputError where the vocabularies differ.
    """
    theirs, ours = source.config.vocab_size, draft.config.vocab_size
    if theirs != ours:
        raise InputError(f"the source has {theirs:,} tokens and the draft {ours:,}: the source cannot check its tokens")
    models: tuple[Any, Any] = (source.eval(), draft.eval())
    written = _written(models[0], prompts, new_tokens)
    whole = torch.cat([prompts, written], 1)
    logits = models[1](input_ids=whole, use_cache=False).logits[:, prompts.shape[1] - 1 : -1].clone()
    # Texts of one length: nobody may end one, so an end is no choice of the draft's either.
    ends: Any = models[0].generation_config.eos_token_id
    logits[..., [ends] if isinstance(ends, int) else list(ends or ())] = float("-inf")
    choices = logits.argmax(-1)
    runs = [accepted(own, other, num_drafted) for own, other in zip(written, choices, strict=True)]
    alone, together = list[float](), list[float]()
    same = True
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        _written(models[0], prompts, new_tokens)
        alone.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        pair = _written(models[0], prompts, new_tokens, models[1], num_drafted)
        together.append(time.perf_counter() - begin)
        same = same and torch.equal(pair, written)
    return Drafting(
        num_prompts=len(prompts), num_tokens=written.numel(), num_drafted=num_drafted,
        acceptance_rate=float((choices == written).double().mean()), tokens_a_check=sum(runs) / len(runs),
        source_s=median(alone), pair_s=median(together), speedup=median(alone) / median(together), same_text=same,
    )  # fmt: skip
