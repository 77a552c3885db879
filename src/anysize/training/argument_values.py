"""Values of transformers.TrainingArguments: of the kind that it takes, and no number that no run could have.

transformers takes any value for any of them and fails late, or not at all: the text "false" is as good as true.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from math import inf
from types import NoneType
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from anysize.errors import did_you_mean

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_STRICT = ConfigDict(strict=True)
# They take more than their annotations say.
_WIDER = ("fsdp",)

# What is wanted of a number, and whether it is that; nan is nothing of all this.
_Range = tuple[str, Callable[[Any], bool]]
_SOME: _Range = ("of 1 or more", lambda value: value >= 1)
_ANY: _Range = ("of 0 or more", lambda value: 0 <= value < inf)
_ABOVE_ZERO: _Range = ("above 0", lambda value: 0 < value < inf)
_BELOW_ONE: _Range = ("of 0 or more and below 1", lambda value: 0 <= value < 1)
_SEED: _Range = ("of 0 or more and below 2**32", lambda value: 0 <= value < 2**32)
_RANGES: dict[str, _Range] = {
    "max_steps": ("of 1 or more, or -1 where num_train_epochs tells", lambda value: value >= 1 or value == -1),
    "warmup_steps": (
        "of whole steps, or a share of the run below 1", lambda value: value >= 0 and (value < 1 or value % 1 == 0)
    ),
    # Infinity clips nothing.
    "max_grad_norm": ("of 0 or more", lambda value: value >= 0),
    "num_train_epochs": _ABOVE_ZERO, "per_device_train_batch_size": _SOME, "per_device_eval_batch_size": _SOME,
    "gradient_accumulation_steps": _SOME, "eval_accumulation_steps": _SOME, "learning_rate": _ANY,
    "weight_decay": _ANY, "adam_beta1": _BELOW_ONE, "adam_beta2": _BELOW_ONE, "adam_epsilon": _ABOVE_ZERO,
    "neftune_noise_alpha": _ANY, "logging_steps": _ANY, "eval_steps": _ABOVE_ZERO, "eval_delay": _ANY,
    "save_steps": _ANY, "seed": _SEED, "data_seed": _SEED, "dataloader_num_workers": _ANY,
    "dataloader_prefetch_factor": _SOME, "ddp_timeout": _SOME, "ddp_bucket_cap_mb": _SOME,
}  # fmt: skip


# What is not read beside another argument that has such a value, and why.
_UNREAD: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("num_train_epochs", "max_steps", lambda steps: steps >= 1, "max_steps tells how long the run is"),
    *(
        (f"{kind}_steps", f"{kind}_strategy", lambda strategy: strategy != "steps", f"{kind}_strategy tells when")
        for kind in ("save", "eval", "logging")
    ),
)


def clashes(given: Mapping[str, Any], where: str) -> list[str]:
    """Return which arguments another one beside them leaves without effect; their values are right by themselves."""
    return [
        f"{where}.{unread} is not read where {where}.{told} is {given[told]!r}: {why}; leave one of them out"
        for unread, told, holds, why in _UNREAD
        if unread in given and told in given and holds(given[told])
    ]


# Keys of what is a mapping itself: those that torch knows, and those of accelerate that would change a step unseen.
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")


def _wrong_keys(given: Mapping[str, Any], where: str) -> list[str]:
    """Return what is wrong within arguments that are mappings."""
    told: list[str] = []
    accelerator = given.get("accelerator_config")
    # Of which transformers has two names.
    for key in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if isinstance(checkpointing := given.get(key), Mapping):
            told += [
                f"unknown key '{where}.{key}.{name}'{did_you_mean(name, _CHECKPOINTING)}"
                for name in checkpointing if name not in _CHECKPOINTING
            ]  # fmt: skip
    if isinstance(accelerator, Mapping):
        if accelerator.get("split_batches"):
            told.append(f"'{where}.accelerator_config.split_batches' is told by per_device_train_batch_size")
        steps = accelerator.get("gradient_accumulation_kwargs")
        if isinstance(steps, Mapping) and "num_steps" in steps:
            told.append(
                f"'{where}.accelerator_config.gradient_accumulation_kwargs.num_steps' is told by "
                "gradient_accumulation_steps"
            )
    return told


# What torch's own optimizers take of optim_args, where transformers passes over what it does not know (and over
# weight_decay, which groups of parameters have by then); the others ask packages of their own, which refuse themselves.
_OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (), "adamw_torch_fused": (), "adafactor": (),
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"), "rmsprop": ("momentum", "alpha", "eps", "centered"),
}  # fmt: skip


def unread_optim_args(optim: str, given: str | None) -> list[str]:
    """Return which of `optim_args`, "name=value" after a comma each, the optimizer would not read."""
    names = [pair.split("=")[0].strip() for pair in given.split(",")] if given else []
    taken = _OPTIM_ARGS.get(optim)
    return [] if taken is None else [
        f"training.optim_args: '{name}' is nothing that the optimizer '{optim}' takes from there"
        f"{did_you_mean(name, taken)}: it takes {', '.join(taken) or 'nothing'}"
        for name in names if name not in taken
    ]  # fmt: skip


def _plain(hint: Any) -> tuple[type, ...]:
    """Return the kinds that a field takes where all are plain ones; others (names, settings) are left out."""
    kinds = get_args(hint) or (hint,)
    return tuple(kind for kind in _KINDS if kind in kinds) if set(kinds) <= _KINDS.keys() else ()


def _wanted(name: str, kinds: tuple[type, ...], choices: Sequence[str]) -> str:
    told = {**_KINDS, str: f"one of {', '.join(choices)}"} if choices else _KINDS
    among = _RANGES[name][0] if name in _RANGES else ""
    return ", or ".join(f"{told[kind]} {among}".rstrip() if kind in (int, float) else told[kind] for kind in kinds)


def wrong_values(given: Mapping[str, Any], where: str) -> list[str]:
    """Return what is wrong with the values of known arguments: each key in its section, what was got and is wanted."""
    from transformers import TrainingArguments  # noqa: PLC0415

    hints = get_type_hints(TrainingArguments)
    listed = {field.name: tuple(field.metadata.get("choices", ())) for field in fields(TrainingArguments)}
    told: list[str] = []
    for name, value in given.items():
        kinds, choices = _plain(hints[name]), listed[name]
        if name in _WIDER or not kinds:
            continue
        try:
            TypeAdapter[Any](hints[name], config=_STRICT).validate_python(value)
            _, holds = _RANGES.get(name, ("", lambda _: True))
            fits = value is None or (holds(value) and (not choices or value in choices))
        except ValidationError:
            fits = False
        if not fits:
            told.append(f"{where}.{name} is {value!r}: wanted {_wanted(name, kinds, choices)}")
    return told + _wrong_keys(given, where)
