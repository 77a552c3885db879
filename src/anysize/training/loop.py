"""One training run: from a start, data and arguments to a trained model, a curve and an account of its cost."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback

from anysize.config import understand
from anysize.errors import InputError
from anysize.flops import forward_flops
from anysize.io.hub import open_checkpoint
from anysize.io.models import quiet_transformers
from anysize.io.whole import told_of_disk
from anysize.progress import Progress
from anysize.training.arguments import examples_a_step
from anysize.training.config import Distill, Recipe
from anysize.training.data import Datasets
from anysize.training.self_data import Continuations
from anysize.training.start import Start, load, num_classes, require_same_vocabulary
from anysize.training.targets import TargetCache
from anysize.training.trainer import AnysizeTrainer, Teacher

if TYPE_CHECKING:
    from transformers import TrainingArguments

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Outcome:
    """What a run found: the trainer with its model, why and at which step it ended, and what was measured.

    curve: step -> {split: loss or error rate}. train_s and teacher_s count what a run did before it was resumed, too.
    first_s: of train_s, the first step. flops_per_s: model FLOPs a second of one process, see `Account`.
    """

    trainer: AnysizeTrainer
    status: Literal["finished", "diverged"]
    step: int
    curve: dict[int, dict[str, float]]
    train_s: float
    teacher_s: float
    first_s: float
    flops_per_s: float | None


class _Watch(TrainerCallback):
    """Tells how far a run is, and stops it once a loss is not finite."""

    def __init__(self, tokens_a_step: int, progress: Progress) -> None:
        self.tokens_a_step, self.progress = tokens_a_step, progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, control, kwargs
        self.progress("train", state.global_step * self.tokens_a_step, state.max_steps * self.tokens_a_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        del args, state, kwargs
        if not _is_finite(logs or {}):
            control.should_training_stop = True


def _is_finite(logs: Mapping[str, Any]) -> bool:
    return all(math.isfinite(float(v)) for k, v in logs.items() if k == "loss" or k.endswith("_loss"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run; what a killed process left half written is removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*"):
        try:
            # The state is written last.
            found.append((json.loads((path / _STATE).read_text(encoding="utf-8"))["global_step"], path))
        except (OSError, ValueError, KeyError, TypeError):
            shutil.rmtree(path, ignore_errors=True)
    return max(found, default=(0, None))[1]


def curve_of(history: list[dict[str, Any]], names: list[str], *, image: bool) -> dict[int, dict[str, float]]:
    """Return what was measured at which step, from a trainer's log."""
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        for name in names:
            key = f"eval_{name}_error_rate" if image else f"eval_{name}_loss"
            if key in entry:
                found.setdefault(int(entry["step"]), {})[name] = float(entry[key])
    return found


def make_teacher(options: Distill, source: str, data: Datasets, start: Start, args: TrainingArguments) -> Teacher:
    """Load the teacher that is named, else the source; raise InputError where it or its options do not fit the run.

    Whoever asks for the distance between streams has seen to it that the teacher is the source of the plan.
    """
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "as stored"
    location = options.teacher or source
    tensors = open_checkpoint(location)
    understood = understand(tensors.config)
    require_same_vocabulary(start.config, understood, location)
    model = load(location, next(start.model.parameters()).dtype)
    model.eval().requires_grad_(False)
    classes = num_classes(start.config)
    # What is kept is what it says in this precision.
    identity = f"{location} {tensors.identity} {model.dtype} {precision}"
    cache = words = None
    if options.cache and data.num_sequences is None:
        raise InputError("distill.cache: streamed sequences have no numbers to keep anything under")
    if options.self_data is not None:
        if start.config.architecture.modality == "image":
            raise InputError("distill.self_data: a teacher goes on from words, and these are images")
        words = Continuations(
            model, options.self_data, folder=options.cache, identity=f"{identity} {data.identity}",
            num_sequences=data.num_sequences, length=data.tokens_each, num_classes=classes,
        )  # fmt: skip
        identity = f"{identity} {options.self_data.model_dump_json()}"
    if options.cache and options.top_k and options.weight:
        assert data.num_sequences is not None
        if start.config.architecture.modality == "image":
            raise InputError("distill.cache: images are flipped at random, so their targets are not always the same")
        cache = TargetCache(
            Path(options.cache), f"{identity} {data.identity} {options.temperature}", num_sequences=data.num_sequences,
            length=data.tokens_each, k=options.top_k, num_classes=classes,
        )  # fmt: skip
    writer = None
    if options.hidden_weight:
        if start.plan is None:
            raise InputError("distill.hidden_weight: needs the writer maps of a plan, and this start has none (resize)")
        from anysize.training.stream import stream_writer  # noqa: PLC0415

        writer = stream_writer(start.plan)
    flops = data.tokens_each * forward_flops(understood, data.tokens_each)
    return Teacher(model, options, flops, cache, writer, words)


def _wrong_share(prediction: Any) -> dict[str, float]:
    return {"error_rate": float((prediction.predictions != prediction.label_ids).mean())}


def _classes(logits: Any, labels: Any) -> torch.Tensor:
    del labels
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def require_shards(args: TrainingArguments) -> None:
    """Refuse FSDP where accelerate would train the whole model in every process, and say nothing."""
    from accelerate import PartialState  # noqa: PLC0415
    from accelerate.utils import DistributedType  # noqa: PLC0415

    if args.fsdp and PartialState().distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise InputError(
            "training.fsdp: shards are for several accelerators under torchrun or accelerate launch, and this run has "
            f"{args.world_size} process(es) on {args.device.type}; leave it out"
        )


def require_trainable(data: Datasets, args: TrainingArguments, distill: Distill | None) -> None:
    """Refuse arguments, and a schedule of the teacher, that a run on such data or so many processes cannot have."""
    require_shards(args)
    if data.num_sequences is None and args.max_steps < 1:
        raise InputError("training.max_steps: a stream has no length, so say how many steps to take")
    if data.num_sequences is None and args.dataloader_num_workers:
        raise InputError("training.dataloader_num_workers: every worker would read the whole stream; leave it out")
    # Images are examples of one token each, and have errors as well.
    image = data.tokens_each == 1
    if distill is not None:
        distill.require_room(_num_steps(data, args))
        if not image:
            distill.require_prompts(data.tokens_each)
    _require_measured(args, list(data.held_out), image=image)


def _num_steps(data: Datasets, args: TrainingArguments) -> int:
    """Return how many steps a run has, whether the arguments say so or the number of epochs does."""
    if args.max_steps > 0 or data.num_sequences is None:
        return args.max_steps
    return math.ceil(args.num_train_epochs * (data.num_sequences // examples_a_step(args)))


def _require_measured(args: TrainingArguments, names: list[str], *, image: bool) -> None:
    """Refuse a best model, or a schedule, by something that is not measured."""
    asked = args.metric_for_best_model
    known = [f"{name}_{what}" for name in names for what in ("loss", *(["error_rate"] if image else []))]
    if asked is not None and asked.removeprefix("eval_") not in known:
        raise InputError(
            f"training.metric_for_best_model is '{asked}': wanted "
            f"{', '.join(known) or 'nothing, because there are no held-out data'}"
        )


def run(
    start: Start,
    data: Datasets,
    args: TrainingArguments,
    *,
    teacher: Teacher | None = None,
    recipe: Recipe | None = None,
    flip: bool = True,
    progress: Progress,
) -> Outcome:
    """Train a start to its last step, going on from the newest whole checkpoint in its output folder."""
    image = start.config.architecture.modality == "image"
    watch = _Watch(examples_a_step(args) * data.tokens_each, progress)
    require_trainable(data, args, None if teacher is None else teacher.options)
    if args.torch_compile:
        # What is left of other runs in this process is of no use, and from the ninth on nothing would be compiled.
        torch.compiler.reset()
    try:
        trainer = AnysizeTrainer(
            start.model, args, config=start.config, tokens_each=data.tokens_each, train=data.train,
            evaluate=data.held_out or None, collate=data.collate,  # pyright: ignore[reportArgumentType]
            teacher=teacher, recipe=recipe or Recipe(), plan=start.plan, flip=flip,
            callbacks=[watch],
        )  # fmt: skip
    except (ValueError, ImportError, RuntimeError, OSError) as error:
        # RuntimeError: what report_to names is not installed. OSError: the Hub cannot be reached.
        raise InputError(f"transformers refuses to train: {' '.join(str(error).split())[:300]}") from error
    if image:
        trainer.compute_metrics, trainer.preprocess_logits_for_metrics = _wrong_share, _classes
    for name in ("PrinterCallback", "ProgressCallback"):
        found = next((c for c in trainer.callback_handler.callbacks if type(c).__name__ == name), None)
        if found is not None:
            trainer.remove_callback(type(found))
    checkpoint = last_checkpoint(Path(str(args.output_dir)))
    if checkpoint is not None:
        trainer.account.restore(checkpoint)
        # Measured when the run began.
        args.eval_on_start = False
    # Checkpoints tell of themselves; this is what report_to keeps.
    with quiet_transformers(), told_of_disk(f"the run in '{args.output_dir}' cannot go on"):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step, wanted = trainer.state.global_step, trainer.state.max_steps
    # Of the run from its beginning: one that is resumed after it diverged has no step left to notice it at.
    diverged = not all(map(_is_finite, trainer.state.log_history))
    status = "diverged" if diverged else "finished"
    if step < wanted and not diverged:
        raise InputError(f"the training data ended after {step} of {wanted} steps: they hold less than one step")
    curve = curve_of(trainer.state.log_history, list(data.held_out), image=image)
    train_s, teacher_s, first_s = trainer.account.of_all(args.device)
    return Outcome(trainer, status, step, curve, train_s, teacher_s, first_s, trainer.account.flops_per_s)
