"""Proofs of a cut vocabulary: the source made to speak the target's ids, and the two tokenizers held side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anysize.axis import AxisMap
from anysize.io.models import tokenizer_of
from anysize.io.provenance import config_json, generation_of, target_companions
from anysize.io.reader import Checkpoint, TensorSource
from anysize.io.whole import scratch_folder
from anysize.proof.verdict import Check, Verification
from anysize.recipe import Plan
from anysize.vocabulary.ids import new_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS = 2048
_LONGEST = 3


def speak_target_ids(source: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """Let a source read the target's token ids and give the logits of the kept tokens only, in the target's order.

    Nothing in its weights changes: ids are looked up before it runs and columns taken after, so that the two models
    can be compared, and can generate, in one language.
    """
    assert plan.kept_tokens is not None
    index = torch.from_numpy(plan.kept_tokens.index)

    def look_up(_m: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        return args, {**named, "input_ids": index.to(named["input_ids"].device)[named["input_ids"]]}

    def take(_m: torch.nn.Module, _args: Any, _named: Any, out: Any) -> Any:
        out.logits = out.logits[..., index.to(out.logits.device)]
        return out

    source.register_forward_pre_hook(look_up, with_kwargs=True)
    source.register_forward_hook(take, with_kwargs=True)
    source.generation_config = generation_of(plan, source)
    return source


def _texts(tokenizer: PreTrainedTokenizerBase, kept: Sequence[int]) -> list[str]:
    """Return seeded texts of one to three kept tokens."""
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, _LONGEST + 1, _TEXTS)
    return [str(tokenizer.decode(draw.choice(kept, size=length).tolist())) for length in lengths]


def differences(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, axis: AxisMap, new: Mapping[int, int]
) -> tuple[int, int]:
    """Return how many kept tokens and texts of kept tokens differ under `new` (old id -> new id), and how many texts.

    A text counts where the source makes it of kept tokens alone: the target has to make it of the same.
    """
    kept = axis.index.tolist()
    wanted: Any = source.convert_ids_to_tokens(kept)
    got: Any = target.convert_ids_to_tokens([new[i] for i in kept])
    wrong = sum(one != other for one, other in zip(wanted, got, strict=True))
    known = set(kept)
    before: Any
    texts = _texts(source, kept)
    before, after = (t(texts, add_special_tokens=False)["input_ids"] for t in (source, target))
    spoken = [(old, now) for old, now in zip(before, after, strict=True) if known.issuperset(old)]
    return wrong + sum([new[i] for i in old] != now for old, now in spoken), len(spoken)


def prove_tokenizer(plan: Plan, tensors: TensorSource) -> Verification:
    """Return the check that the target's tokenizer says the same of kept tokens; its control has ids one further.

    Both are loaded as users load them. Without a tokenizer beside the source there is none to prove, which is noted.
    """
    axis = plan.kept_tokens
    assert axis is not None
    if not isinstance(tensors, Checkpoint) or not plan.tokenizer_sha256:
        return Verification(checks=(), notes=("the source has no tokenizer: cut yours to the kept tokens",))
    with scratch_folder() as place:
        for name, data in [*target_companions(plan, tensors), ("config.json", config_json(plan))]:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        source, target = tokenizer_of(str(tensors.folder)), tokenizer_of(str(place))
    new = new_ids(axis)
    measured, texts = differences(source, target, axis, new)
    further = {old: (i + 1) % axis.target_size for old, i in new.items()}
    return Verification(
        checks=(
            Check(
                name="tokenizer",
                what=f"{axis.target_size} tokens under their new ids, {texts} texts of them",
                unit="that differ",
                measured=float(measured),
                tolerance=0.0,
                control=float(differences(source, target, axis, further)[0]),
            ),
        )
    )
