"""How a grown model is trained where its config is silent: so that it loses nothing of what it came with.

What came from the source takes a tenth of the steps that new values take, and for half of the run the source goes on
teaching. docs/training.md has it beside other ways.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from anysize.config import SourceConfig
from anysize.io.models import empty_model
from anysize.tensors import expected_tensors
from anysize.training.config import Distill, NewParameters, Recipe, Section
from anysize.training.optimizer_state import ADAMW, sharded

DISTILL = Distill(weight=0.5, until_step=0.5)
RECIPE = Recipe(new_parameters=NewParameters(old_learning_rate_factor=0.1))
NOTE = (
    "grown gently: a tenth of the learning rate for what came from the source, and half of the loss from the source "
    "for half of the run; give distill or recipe to train otherwise"
)
Asked = TypeVar("Asked", bound=Section)


def gently(
    asked: Asked, preset: str, training: Mapping[str, Any], sizes: Callable[[], tuple[SourceConfig, SourceConfig]],
    *, teacher: str = "",
) -> tuple[Asked, str]:  # fmt: skip
    """Return a run's config, or an arm's, with `distill` and `recipe` as growing wants them, and a note that says so.

    What names a preset, a `distill` or a `recipe` is left as it is, and so is what does not grow in width or shrinks
    anywhere: `sizes` gives the configs of source and target, and is not called before they matter. Where growth cannot
    be trained like this, the note says why. teacher: as in `Distill`.
    """
    if preset != "auto" or asked.model_fields_set & {"distill", "recipe"}:
        return asked, ""
    source, target = sizes()
    if not _grows(source, target):
        return asked, ""
    if why := _why_not(target, training):
        return asked, f"not grown gently: {why}"
    distill = DISTILL.model_copy(update={"teacher": teacher})
    return asked.model_copy(update={"distill": distill, "recipe": RECIPE}), NOTE


def _grows(source: SourceConfig, target: SourceConfig) -> bool:
    sizes = {axis: (size, target.sizes.get(axis, size)) for axis, size in source.sizes.items()}
    wider = any(before < after for axis, (before, after) in sizes.items() if axis not in ("layer", "vocab"))
    # A teacher has the same vocabulary.
    return wider and all(before <= after for before, after in sizes.values()) and len(set(sizes.get("vocab", ()))) < 2


def _why_not(target: SourceConfig, training: Mapping[str, Any]) -> str:
    if sharded(training.get("fsdp"), training.get("deepspeed")):
        return "old and new values lie in the same tensors, and this run shards them"
    if (optim := str(training.get("optim", ADAMW[0]))) not in ADAMW:
        return f"it needs AdamW, and training.optim is {optim}"
    in_memory = {name for name, _ in empty_model(target.model_class, target.full).named_parameters()}
    if other := sorted(expected_tensors(target).keys() - in_memory):
        return f"transformers fuses or renames tensors in memory, such as '{other[0]}'"
    return ""
