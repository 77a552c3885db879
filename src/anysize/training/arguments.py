"""Options of transformers.TrainingArguments: checked by name and value, with the defaults that we give them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from anysize.errors import InputError, did_you_mean, joined
from anysize.training.argument_values import clashes, unread_optim_args, wrong_values

# What a run does where the config is silent: the field's habits for decoders, a checkpoint now and then.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "learning_rate": 5e-4, "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.05, "weight_decay": 0.1, "adam_beta2": 0.95,
    "max_grad_norm": 1.0, "logging_steps": 10, "logging_nan_inf_filter": False, "report_to": "none",
    "save_steps": 500, "ddp_find_unused_parameters": False, "save_total_limit": 2, "seed": 0,
}  # fmt: skip
# Schedules that follow what is measured.
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# What the config says elsewhere, or what would contradict it.
_OURS = {
    "output_dir": "output", "resume_from_checkpoint": "the same command, which resumes by itself",
    "remove_unused_columns": "nothing: the data have no other columns", "disable_tqdm": "--quiet",
    "dataloader_drop_last": "nothing: every step is whole, and held-out data are read to their end",
    "auto_find_batch_size": "per_device_train_batch_size (--plan-only tells what a batch takes): a batch that becomes "
    "smaller while it trains makes other tokens of a step than are told",
    "save_only_model": "nothing: a run that goes on needs its optimizer",
    "ignore_data_skip": "nothing: a run that goes on sees what it has not seen",
    "prediction_loss_only": "nothing: the data say what is measured",
    "batch_eval_metrics": "nothing: the data say what is measured",
    "eval_do_concat_batches": "nothing: the data say what is measured",
    "include_for_metrics": "nothing: the data say what is measured",
    "logging_nan_inf_filter": "nothing: a run whose loss is not finite has diverged, and says so",
    "do_train": "nothing", "do_eval": "nothing", "do_predict": "nothing",
    "label_smoothing_factor": "nothing: losses are compared, and smoothed ones are others",
}  # fmt: skip


def check_training_arguments(sections: Mapping[str, Mapping[str, Any]], origin: str) -> None:
    """Refuse what transformers.TrainingArguments does not know or cannot use, before anything is loaded or made.

    sections: arguments by where they stand in the config, such as "training". All that is wrong is told at once.
    """
    from transformers import TrainingArguments  # noqa: PLC0415

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} - _OURS.keys()
    wrong: list[str] = []
    for where, given in sections.items():
        wrong += [
            f"'{where}.{name}' is told by {_OURS[name]}" if name in _OURS
            else f"unknown key '{where}.{name}'{did_you_mean(name, known)}"
            for name in given if name not in known
        ]  # fmt: skip
        odd = wrong_values({name: value for name, value in given.items() if name in known}, where)
        wrong += odd or clashes(given, where)
    if wrong:
        raise InputError(f"the config '{origin}' cannot be used: {joined(wrong)}")


def with_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config gives over our defaults; a scheduler of the user's brings its own settings."""
    made = {**DEFAULTS, **given}
    if isinstance(settings := made["lr_scheduler_kwargs"], str):
        # As transformers reads it; what is no JSON, it refuses.
        with suppress(ValueError):
            made["lr_scheduler_kwargs"] = json.loads(settings)
    other = given.get("lr_scheduler_type", DEFAULTS["lr_scheduler_type"]) != DEFAULTS["lr_scheduler_type"]
    if other and "lr_scheduler_kwargs" not in given:
        del made["lr_scheduler_kwargs"]
    if given.get("load_best_model_at_end") or given.get("lr_scheduler_type") in _BY_METRIC:
        # Held-out data have names here, and metrics have theirs in front.
        made.setdefault("metric_for_best_model", "validation_loss")
    return made


def training_arguments(given: Mapping[str, Any], origin: str) -> Any:
    """Return transformers.TrainingArguments of a config; raise InputError where transformers refuses them."""
    from transformers import TrainingArguments  # noqa: PLC0415

    try:
        return TrainingArguments(**given)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(f"the config '{origin}' cannot be used: transformers refuses training: {why}") from error


def require_buildable(args: Any, origin: str) -> None:
    """Raise InputError where the optimizer, the schedule or a reporter that is asked for cannot be made."""
    import torch  # noqa: PLC0415
    from transformers import Trainer, get_scheduler  # noqa: PLC0415
    from transformers.integrations import get_reporting_integration_callbacks  # noqa: PLC0415

    try:
        for made in get_reporting_integration_callbacks(args.report_to):
            made()
    except (ImportError, RuntimeError, ValueError) as error:
        # RuntimeError: it is not installed.
        why = " ".join(str(error).split())[:300]
        raise InputError(f"the config '{origin}' cannot be used: training.report_to: {why}") from error
    if args.train_sampling_strategy not in ("random", "sequential"):
        raise InputError(
            f"the config '{origin}' cannot be used: training.train_sampling_strategy '{args.train_sampling_strategy}' "
            "is for examples of different lengths, and these are all as long: wanted random or sequential"
        )
    _require_extras(args, origin)
    if unread := unread_optim_args(str(args.optim.value), args.optim_args):
        raise InputError(f"the config '{origin}' cannot be used: {joined(unread)}")
    # With the rate that is asked for: some schedules end at one that has to be below it.
    stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
        get_scheduler(args.lr_scheduler_type, stand_in, 1, 10, args.lr_scheduler_kwargs)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"the config '{origin}' cannot be used: transformers cannot make the optimizer or the schedule of "
            f"training.optim, lr_scheduler_type and lr_scheduler_kwargs: {why}"
        ) from error


def _require_extras(args: Any, origin: str) -> None:
    """Raise InputError where what makes a run faster or smaller is not installed, or has no such setting."""
    from transformers.utils import is_liger_kernel_available  # noqa: PLC0415

    if args.use_liger_kernel and not is_liger_kernel_available():
        raise InputError(
            f"the config '{origin}' cannot be used: training.use_liger_kernel needs liger-kernel installed"
        )
    if args.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # noqa: PLC0415

        if args.torch_compile_mode not in (modes := list(list_mode_options())):
            raise InputError(
                f"the config '{origin}' cannot be used: training.torch_compile_mode is '{args.torch_compile_mode}': "
                f"wanted one of {', '.join(modes)}"
            )


def examples_a_step(args: Any) -> int:
    """Return how many sequences (or images) one step of all processes sees."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def fixed_arguments(output: str) -> dict[str, Any]:
    """Return what every run of ours needs: its folder, no bars of transformers, and batches as we make them."""
    import torch  # noqa: PLC0415

    return {"output_dir": output, "disable_tqdm": True, "remove_unused_columns": False,
            "dataloader_pin_memory": torch.cuda.is_available()}  # fmt: skip
