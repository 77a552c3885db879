"""The trainer: transformers' own, with distillation, rates by role and by age, and an account of its seconds."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils.operations import recursively_apply
from torch.utils.data import RandomSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from anysize.config import SourceConfig
from anysize.errors import CheckpointError, InputError
from anysize.flops import training_flops
from anysize.io.hub import open_checkpoint
from anysize.io.whole import read_json, told_of_disk, write_json
from anysize.processes import add_up, rank_and_world
from anysize.training.arguments import examples_a_step
from anysize.training.clock import clock_of
from anysize.training.config import Distill, Recipe
from anysize.training.distill import distilled, kl_divergence, kl_of_top, stream_distance, top_targets
from anysize.training.groups import ElementwiseAdamW, grouped, new_elements, roles
from anysize.training.images import flipped
from anysize.training.optimizer_state import carried_state, require_recipe, require_state, set_state
from anysize.training.self_data import Continuations
from anysize.training.start import folder_of, taken_up
from anysize.training.stream import streams_in_common
from anysize.training.targets import TargetCache

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedModel, TrainingArguments

    from anysize.recipe import Plan


_ACCOUNT = "anysize-account.json"
_GOES_ON = "make room, and the same command goes on from the last whole checkpoint"
# Of how many steps the speed is a median.
_RECENT = 1_000


@contextmanager
def _told_of_damage(checkpoint: str | None) -> Generator[None]:
    """While active, what cannot be read of a checkpoint is one sentence."""
    try:
        yield
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, UnpicklingError, InputError) as error:
        # Its own sentence is told by the command line, which knows it by its name.
        if checkpoint is None or type(error).__name__ == "OutOfMemoryError":
            raise
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"cannot go on from the checkpoint '{checkpoint}': {why}; remove it, and the same command goes on from the "
            "one before it"
        ) from error


@dataclass
class Teacher:
    """What is distilled from: a model, what to take of it, the writer map [m, n] of its stream, and its words.

    flops: of its forward pass for one example.
    """

    model: PreTrainedModel
    options: Distill
    flops: float
    cache: TargetCache | None = None
    writer: torch.Tensor | None = None
    words: Continuations | None = None


@dataclass
class Account:
    """Seconds spent: of the processor where the model is on it, of the clock on an accelerator.

    first_s: of train_s, what the first step took beyond its teacher: what is compiled is compiled there.
    teacher_flops: what the teacher has done in the step that is under way.
    """

    train_s: float = 0.0
    teacher_s: float = 0.0
    first_s: float = 0.0
    clock: Callable[[], float] = field(default=time.process_time)
    teacher_flops: float = 0.0
    _speeds: deque[float] = field(default_factory=lambda: deque[float](maxlen=_RECENT))

    def add_step(self, seconds: float, flops: float) -> None:
        """Count a step in which the model itself did so many operations."""
        if not self.train_s:
            self.first_s = max(0.0, seconds - self.teacher_s)
        self.train_s += seconds
        self._speeds.append((flops + self.teacher_flops) / max(seconds, 1e-9))
        self.teacher_flops = 0.0

    @property
    def flops_per_s(self) -> float | None:
        """Model FLOPs a second of one process, the teacher's included: the median of the steps since it began.

        So the first steps, in which a model is compiled, do not count, and nothing that is computed twice to save
        memory. None before the first step.
        """
        return median(self._speeds) if self._speeds else None

    def of_all(self, device: torch.device) -> tuple[float, float, float]:
        """Return the seconds of training, of the teacher and of the first step.

        Processors' seconds add up, a clock is one for all.
        """
        spent = torch.tensor([self.train_s, self.teacher_s, self.first_s], dtype=torch.float64)
        if device.type == "cpu":
            add_up([spent])
        return float(spent[0]), float(spent[1]), float(spent[2])

    def save(self, checkpoint: Path, train_s: float, teacher_s: float, first_s: float) -> None:
        """Keep what all have spent beside a checkpoint, so that a resumed run goes on counting."""
        told = {"train_s": train_s, "teacher_s": teacher_s, "first_s": first_s}
        write_json(checkpoint / _ACCOUNT, told, fix=_GOES_ON)

    def restore(self, checkpoint: Path) -> None:
        """Take up what was spent until a checkpoint; nothing where a kill came before it was written.

        In the first process alone: it stands for all of them.
        """
        place = checkpoint / _ACCOUNT
        if place.is_file() and rank_and_world()[0] == 0:
            told = read_json(place, fix="remove it, and the seconds before it are not counted")
            self.train_s, self.teacher_s, self.first_s = (told.get(k, 0.0) for k in ("train_s", "teacher_s", "first_s"))


class _Clock(TrainerCallback):
    """Accounts for whole steps: their data, forward, backward and optimizer, without evaluation and saving.

    flops: of the model alone in a step of one process.
    """

    def __init__(self, account: Account, flops: float) -> None:
        self.account, self.flops, self.begin = account, flops, 0.0

    def start(self) -> None:
        """Begin a step. transformers says so when its data are there already."""
        self.begin = self.account.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del args, state, control, kwargs
        self.account.add_step(self.account.clock() - self.begin, self.flops)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        del control, kwargs
        spent = self.account.of_all(args.device)
        if state.is_world_process_zero:
            self.account.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", *spent)


class AnysizeTrainer(Trainer):
    """A Trainer that also learns from a teacher. `account` says what training, and the teacher in it, took."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        *,
        config: SourceConfig,
        tokens_each: int,
        train: Dataset[Any],
        evaluate: Dataset[Any] | None,
        collate: Callable[[list[Any]], dict[str, Any]],
        teacher: Teacher | None,
        recipe: Recipe,
        plan: Plan | None,
        flip: bool,
        callbacks: list[TrainerCallback],
    ) -> None:
        super().__init__(
            model, args, data_collator=collate, train_dataset=train, eval_dataset=evaluate, callbacks=callbacks
        )
        self.source_config, self.teacher, self.recipe, self.plan = config, teacher, recipe, plan
        self.flip = flip and config.architecture.modality == "image"
        self.account = Account(clock=clock_of(self.args.device))
        here = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        self._clock = _Clock(self.account, here * tokens_each * training_flops(config, tokens_each))
        self.add_callback(self._clock)
        # The loss is a mean over what a batch holds, and all batches hold alike.
        self.model_accepts_loss_kwargs = False
        if teacher is not None:
            moved: Any = teacher.model
            moved.to(self.args.device)
            if teacher.writer is not None:
                teacher.writer = teacher.writer.to(self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint, or leave none: half of one would be room that the rest needs."""
        place = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with told_of_disk(f"cannot save the checkpoint '{place}'", _GOES_ON):
            try:
                super()._save_checkpoint(model, trial)
            except Exception:
                if not (place / TRAINER_STATE_NAME).is_file():
                    shutil.rmtree(place, ignore_errors=True)
                raise

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model as a plain checkpoint, gathered where it is sharded; all processes have to call this."""
        if not self.is_fsdp_enabled or _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        # transformers writes no model where checkpoints are sharded, and says nothing.
        state: Any = self.accelerator.get_state_dict(self.model)
        if self.args.should_save:
            self._save(output_dir, state)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # A gathered state holds tied tensors twice.
        if state_dict is not None:
            model: Any = self.accelerator.unwrap_model(self.model)
            tied = getattr(model, "all_tied_weights_keys", {})
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with _told_of_damage(resume_from_checkpoint):
            if self.is_fsdp_enabled:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                taken_up(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _told_of_damage(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with _told_of_damage(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _told_of_damage(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            taken_up(self.model, str(self.state.best_model_checkpoint))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Return a sampler whose epochs end with a whole step, so that every step sees as much.

        What is left over is another part of the data in each epoch, where their order is random.
        """
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        sampler = super()._get_train_sampler(dataset)
        if sampler is None:
            return None
        each = examples_a_step(self.args)
        whole = len(dataset) // each * each
        return RandomSampler(dataset, num_samples=whole) if isinstance(sampler, RandomSampler) else range(whole)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Return the batches of the next step; none where a run was killed after its last one."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        self._clock.start()
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Measure examples once: accelerate fills up the last batches of several processes with copies of the first."""
        size = len(next(iter(inputs.values())))
        real = self._num_real(size)
        if real in (0, size):
            # A process of which nothing counts takes part all the same: it may hold shards that others need.
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = {name: values[:real] for name, values in inputs.items()}
        loss, *others = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

        def filled_up(rows: torch.Tensor) -> torch.Tensor:
            # What is gathered has as many rows in every process.
            return torch.cat([rows, rows[:1].expand(size - real, *rows.shape[1:])])

        logits, labels = (None if given is None else recursively_apply(filled_up, given) for given in others)
        return loss, logits, labels

    def _num_real(self, size: int) -> int:
        """Return how many examples of a held-out batch come from the data: the first ones, of the first processes."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return size
        return min(max(state.remainder - self.accelerator.process_index * size, 0), size)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the plain loss, or while a teacher is listened to, its mixture with the distance to the teacher."""
        del num_items_in_batch
        inputs = {**inputs}
        sequence = inputs.pop("sequence", None)
        training = model.training
        if training and self.flip:
            assert sequence is not None
            epoch = int(self.state.epoch or 0)
            inputs["pixel_values"] = flipped(inputs["pixel_values"], sequence, self.args.seed * 1_009 + epoch)
        teacher, share = (self.teacher, 1.0) if training else (None, 0.0)
        if teacher is not None and not (share := teacher.options.share(self.state.global_step, self.state.max_steps)):
            teacher = None
        more = {"use_cache": False} if "input_ids" in inputs else {}
        if teacher is not None and teacher.words is not None:
            begin = self.account.clock()
            with self.accelerator.autocast():
                ids = teacher.words.of(inputs["input_ids"], sequence)
            inputs |= {"input_ids": ids, "labels": ids}
            self.account.teacher_s += self.account.clock() - begin
        if teacher is not None and teacher.options.hidden_weight:
            more["output_hidden_states"] = True
        outputs = model(**inputs, **more)
        loss = outputs.loss
        if teacher is not None and (teacher.options.weight or teacher.options.hidden_weight):
            loss = self._with_teacher(teacher, share, loss, outputs, inputs, sequence)
        return (loss, outputs) if return_outputs else loss

    def _with_teacher(
        self, teacher: Teacher, share: float, plain: torch.Tensor, outputs: Any, inputs: Mapping[str, Any],
        sequence: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        options, begin = teacher.options, self.account.clock()
        asked = {name: values for name, values in inputs.items() if name != "labels"}
        hidden = options.hidden_weight > 0
        found: Any = None

        def run() -> torch.Tensor:
            nonlocal found
            more = {"use_cache": False} if "input_ids" in asked else {}
            # As the student computes: only what accelerate has prepared does so by itself.
            with torch.no_grad(), self.accelerator.autocast():
                found = teacher.model(**asked, **more, **({"output_hidden_states": True} if hidden else {}))
            self.account.teacher_flops += len(found.logits) * teacher.flops
            return found.logits

        if not options.weight:
            run()
            kl = torch.zeros_like(plain)
        elif options.top_k is None:
            kl = kl_divergence(run(), outputs.logits, options.temperature)
        else:

            def targets() -> tuple[torch.Tensor, torch.Tensor]:
                return top_targets(run(), options.top_k or 1, options.temperature)

            known = teacher.cache is not None and sequence is not None and not hidden
            assert teacher.cache is not None or not known
            classes, logs = teacher.cache.of(sequence, targets) if known else targets()  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
            kl = kl_of_top(classes.to(plain.device), logs.to(plain.device), outputs.logits, options.temperature)
        loss = distilled(plain, kl, share * options.weight, options.temperature)
        if hidden:
            assert teacher.writer is not None
            loss = loss + share * options.hidden_weight * self._hidden(outputs, found, teacher.writer)
        self.account.teacher_s += self.account.clock() - begin
        return loss

    def _hidden(self, student: Any, teacher: Any, writer: torch.Tensor) -> torch.Tensor:
        """Return the mean distance between the streams before layers of the target; the embedding is one of them."""
        assert self.plan is not None
        ours, theirs = student.hidden_states, teacher.hidden_states
        pairs = streams_in_common(self.plan)
        return torch.stack([stream_distance(ours[layer], theirs[of], writer) for layer, of in pairs]).mean()

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimizer of the arguments, or AdamW with rates by role and by age where a recipe asks for it.

        It starts with the state that the source's has left, where the recipe carries it.
        """
        recipe, args = self.recipe, self.args
        made: Any = self.optimizer
        if made is not None or recipe == Recipe():
            return super().create_optimizer(model)
        require_recipe(recipe, args)
        trained: Any = self.model if model is None else model
        plain = self.accelerator.unwrap_model(trained)
        if recipe.learning_rate_factors or recipe.new_parameters:
            self.optimizer = self._with_rates_of_their_own(plain)
        else:
            super().create_optimizer(model)
        assert self.optimizer is not None
        if recipe.optimizer_state == "carried":
            assert self.plan is not None
            folder = Path(folder_of(open_checkpoint(self.plan.source.location)))
            state, steps = carried_state(self.plan, require_state(folder, args, recipe), plain)
            set_state(self.optimizer, plain, state, steps)
        return self.optimizer

    def _with_rates_of_their_own(self, plain: PreTrainedModel) -> torch.optim.Optimizer:
        recipe, args = self.recipe, self.args
        role_of = roles(plain, self.source_config)
        decayed = self.get_decay_parameter_names(plain)
        groups = grouped(plain, role_of, recipe.learning_rate_factors, args.learning_rate, args.weight_decay, decayed)
        betas = (args.adam_beta1, args.adam_beta2)
        if recipe.new_parameters is None:
            return torch.optim.AdamW(groups, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
        if self.plan is None:
            raise InputError("recipe.new_parameters: only a start that a plan makes (resize) has new parameters")
        parameters = dict(plain.named_parameters())
        new = {parameters[n]: mask.to(args.device) for n, mask in new_elements(self.plan, plain).items()}
        rates = recipe.new_parameters.of_run(self.state.max_steps)
        return ElementwiseAdamW(groups, new, rates, lr=args.learning_rate, betas=betas, eps=args.adam_epsilon)
