"""A model that is evaluated: loaded, placed, and with what comparing it needs to know."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from anysize.axis import AxisMap
from anysize.config import SourceConfig, understand
from anysize.devices import chosen_device
from anysize.errors import InputError
from anysize.io.dtypes import TORCH
from anysize.io.hub import open_checkpoint
from anysize.io.provenance import read_record
from anysize.proof.coverage import check_source
from anysize.proof.parity import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """`name` is what the user called it, `home` where its tokenizer lies; `tokens_cut` says that anysize cut them."""

    name: str
    home: str
    model: PreTrainedModel
    config: SourceConfig
    tokens_cut: bool = False

    @property
    def vocab_size(self) -> int:
        return self.config.sizes["vocab"]

    @property
    def is_image_model(self) -> bool:
        return self.config.architecture.modality == "image"

    @property
    def longest(self) -> int | None:
        """Most tokens that the config gives positions to."""
        return getattr(self.model.config, "max_position_embeddings", None)

    @torch.no_grad()
    def logits(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the model's logits of a batch; pictures are cast to its dtype."""
        model: Any = self.model
        fixed: dict[str, Any] = {} if self.is_image_model else {"use_cache": False}
        placed = {
            name: values.to(model.device, model.dtype if values.is_floating_point() else None)
            for name, values in inputs.items()
        }
        return model(**placed, **fixed).logits


def opened(model: str | Path | PreTrainedModel, role: str, *, device: str, dtype: str) -> Subject:
    """Return a folder, Hub id or loaded model as a subject; a loaded one stays where it is.

    Raises InputError for anything else, and as `anysize.plan` does where a checkpoint is not understood.
    """
    if isinstance(model, (str, Path)):
        return _from_folder(str(model), device, dtype)
    if not hasattr(model, "config") or not hasattr(model, "state_dict"):
        raise InputError(f"the {role} is a {type(model).__name__}, wanted a folder, a Hub id or a transformers model")
    if set_ := [f"{name}={value}" for name, value in (("device", device), ("dtype", dtype)) if value != "auto"]:
        raise InputError(f"{' and '.join(set_)}: the {role} is loaded already; move it before, or give its folder")
    raw = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    name = model.name_or_path or type(model).__name__
    return Subject(name, name, model, understand(raw))


def _from_folder(name: str, device: str, dtype: str) -> Subject:
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype={dtype!r}: wanted auto, {', '.join(DTYPES)}")
    checkpoint = open_checkpoint(name)
    config = understand(checkpoint.config)
    check_source(config, checkpoint)
    place = chosen_device(device)
    if dtype != "auto":
        wanted = DTYPES[dtype]
    else:
        # Processors compute in float32 as fast as in halves, or faster; elsewhere the model runs as it is stored.
        stored = {TORCH[info.dtype] for info in checkpoint.tensors.values()}
        wanted = stored.pop() if len(stored) == 1 and place.type != "cpu" else torch.float32
    loaded: Any = load(checkpoint.folder, config.model_class, dtype=wanted)
    cut = _tokens_were_cut(read_record(checkpoint.folder))
    return Subject(name, str(checkpoint.folder), loaded.to(place), config, cut)


def _tokens_were_cut(record: dict[str, Any] | None) -> bool:
    """Whether the plan beside a checkpoint kept some tokens of its source; a plan of another form says nothing."""
    plan: Any = (record or {}).get("plan")
    try:
        vocab = AxisMap.model_validate(plan["axes"]["vocab"])
    except (KeyError, TypeError, ValidationError):
        return False
    return vocab.target_size < vocab.source_size


def require_comparable(subject: Subject, source: Subject) -> None:
    """Raise InputError where the two do not give probabilities of the same things."""
    if subject.is_image_model != source.is_image_model:
        kinds = ["images" if s.is_image_model else "text" for s in (subject, source)]
        raise InputError(f"'{subject.name}' reads {kinds[0]} and '{source.name}' {kinds[1]}: they cannot be compared")
    if subject.is_image_model:
        asked = ("image_size", "num_channels", "num_labels", "id2label")
        pairs = [(key, getattr(subject.model.config, key), getattr(source.model.config, key)) for key in asked]
        wrong = [f"{key} is {ours!r} and {theirs!r}"[:120] for key, ours, theirs in pairs if ours != theirs]
        if wrong:
            raise InputError(f"'{subject.name}' and '{source.name}' cannot be compared: their {'; '.join(wrong)}")
        return
    for one, other in ((subject, source), (source, subject)):
        if one.tokens_cut and one.vocab_size != other.vocab_size:
            raise InputError(
                f"the vocabulary of '{one.name}' was cut by --keep-tokens to {one.vocab_size:,} tokens and "
                f"'{other.name}' has {other.vocab_size:,}: they spell text differently, so there is no KL or agreement "
                "token by token; evaluate each alone and compare their bits per byte"
            )
    if subject.vocab_size < source.vocab_size:
        raise InputError(
            f"'{subject.name}' has {subject.vocab_size:,} tokens and the source '{source.name}' {source.vocab_size:,}: "
            "KL(source || model) is infinite where the model lacks a token; evaluate each alone and compare their bits "
            "per byte"
        )


@contextmanager
def evaluating(*subjects: Subject | None) -> Generator[None]:
    """Turn dropout off while models are measured, and leave loaded ones as they were."""
    modes = [(s.model, s.model.training) for s in subjects if s is not None]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)
