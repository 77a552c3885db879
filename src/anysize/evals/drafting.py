"""What a draft model is worth: how many of its tokens the source accepts, and how much faster the pair generates.

Greedy speculative decoding (Leviathan et al. 2022, 2211.17192; transformers' assisted generation): the draft proposes
some tokens, the source checks them in one pass and keeps those that it would have chosen itself. The text is the
source's own, whatever the draft says.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict

from anysize.errors import InputError
from anysize.io.card import CARD, read_card, with_section
from anysize.io.models import quiet_transformers
from anysize.io.whole import told_of_disk, write_json, write_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "anysize-draft.json"
_SECTION = "draft"
_ROUNDS = 3
# What stays of a generation config: the rest (penalties, suppressed tokens, ...) changes what a model chooses.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class Drafting(BaseModel):
    """What was measured on continuations of held-out text.

    acceptance_rate: the share of the proposed tokens that the source takes, `num_drafted` proposed at a time.
    tokens_a_check: that one pass of the source then gives on average. agreement: the share of tokens at which the
    draft's choice is the source's, both after the source's own text. speedup: the source's own seconds over those of
    the pair, medians of rounds that alternate. same_text: whether both wrote alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_prompts: int
    num_tokens: int
    num_drafted: int
    acceptance_rate: float
    agreement: float
    tokens_a_check: float
    source_s: float
    pair_s: float
    speedup: float
    same_text: bool


class Checks(NamedTuple):
    """Checks of a text: how many, how many tokens were proposed in them and taken, and how many they gave in all."""

    checks: int
    proposed: int
    taken: int
    given: int


def checks_of(source: torch.Tensor, draft: torch.Tensor, num_drafted: int) -> Checks:
    """Return the checks that give a text; both: int64 [tokens], the source's and the draft's choices.

    A check takes the proposals up to the first that is refused, and gives one token of the source's own beside them.
    Counted are those that begin before the last `num_drafted` tokens: what comes of them is known to their ends.
    """
    agree = (source == draft).tolist()
    count = taken = place = 0
    while place < len(agree) - num_drafted:
        run = 0
        while run < num_drafted and agree[place + run]:
            run += 1
        count, taken, place = count + 1, taken + run, place + run + 1
    return Checks(count, count * num_drafted, taken, count + taken)


@contextmanager
def _plainly(source: Any, draft: Any, num_drafted: int) -> Generator[None]:
    """Let both models take their likeliest token whatever their generation configs ask for, which come back after."""
    from transformers import GenerationConfig  # noqa: PLC0415

    kept = source.generation_config, draft.generation_config
    # The source's for both: an end of the draft's own would cut its proposals short.
    special = {name: getattr(kept[0], name) for name in _SPECIAL}
    source.generation_config = GenerationConfig(**special)
    draft.generation_config = GenerationConfig(
        **special, num_assistant_tokens=num_drafted, num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )  # fmt: skip
    try:
        yield
    finally:
        source.generation_config, draft.generation_config = kept


def _written(model: Any, prompts: torch.Tensor, new: int, assistant: Any = None) -> torch.Tensor:
    """Return what a model writes after each prompt, one prompt at a time, as assisted generation asks for."""
    rows: list[torch.Tensor] = []
    for prompt in prompts:
        with quiet_transformers():
            found = model.generate(
                prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, assistant_model=assistant,
            )  # fmt: skip
        rows.append(found[0, len(prompt) :])
    return torch.stack(rows)


def _choices(draft: Any, prompts: torch.Tensor, written: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Return the draft's choice at every written token, int64 [prompts, tokens]; ends are never chosen."""
    rows: list[torch.Tensor] = []
    # One prompt at a time: the logits of all of them are more than a device has room for.
    for prompt, text in zip(prompts, written, strict=True):
        logits = draft(input_ids=torch.cat([prompt, text])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logits = logits.clone()
        logits[:, ends] = float("-inf")
        rows.append(logits.argmax(-1))
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
    # Texts of one length: nobody may end one, so an end is no choice of the draft's either.
    ends: Any = models[0].generation_config.eos_token_id
    alone, together = list[float](), list[float]()
    same = True
    with _plainly(*models, num_drafted):
        # Longer than what is timed: checks at its end are followed to theirs, as to leave them out favours short ones.
        longer = _written(models[0], prompts, new_tokens + num_drafted)
        written = longer[:, :new_tokens]
        choices = _choices(models[1], prompts, longer, [ends] if isinstance(ends, int) else list(ends or ()))
        for _ in range(_ROUNDS):
            begin = time.perf_counter()
            _written(models[0], prompts, new_tokens)
            alone.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            pair = _written(models[0], prompts, new_tokens, models[1])
            together.append(time.perf_counter() - begin)
            same = same and torch.equal(pair, written)
    found = [checks_of(own, other, num_drafted) for own, other in zip(longer, choices, strict=True)]
    count, proposed, taken, given = (sum(amounts) for amounts in zip(*found, strict=True))
    return Drafting(
        num_prompts=len(prompts), num_tokens=written.numel(), num_drafted=num_drafted, acceptance_rate=taken / proposed,
        agreement=float((choices[:, :new_tokens] == written).double().mean()), tokens_a_check=given / count,
        source_s=median(alone), pair_s=median(together), speedup=median(alone) / median(together), same_text=same,
    )  # fmt: skip


def save_drafting(found: Drafting, source: str, folder: Path) -> None:
    """Write what was measured beside the draft and into its card; raise OutputError where that fails."""
    folder = folder.expanduser()
    write_json(folder / RECORD, {"source": source, **found.model_dump()})
    card = with_section(read_card(folder, _SECTION), _SECTION, _card(found, source))
    with told_of_disk(f"the card of '{folder}' cannot be written"):
        write_whole({folder / CARD: card.encode()})


def _card(found: Drafting, source: str) -> str:
    """Return what a card tells of a draft: what it was measured on, beside which source, and what came of it."""
    return (
        "## As a draft\n\n"
        f"A draft of {Path(source).name} for assisted generation: `source.generate(..., assistant_model=draft)`. After "
        f"{found.num_prompts:,} held-out prompts, {found.num_tokens:,} tokens, {found.num_drafted} proposed at a time:"
        "\n\n"
        "| what | value |\n| --- | --- |\n"
        f"| acceptance rate, share of the proposed tokens | {found.acceptance_rate:.3f} |\n"
        f"| tokens for each check | {found.tokens_a_check:.2f} |\n"
        f"| agreement with the source, share of all tokens | {found.agreement:.3f} |\n"
        f"| seconds of the source alone, over those of the pair | {found.speedup:.2f} |\n"
        f"| same text | {'yes' if found.same_text else 'no'} |\n"
    )
