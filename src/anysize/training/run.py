"""Training from a config: `anysize train`. A run leaves a folder that says what it was and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.calibration.scores import model_sha256
from anysize.config import SourceConfig, read_config, understand
from anysize.errors import AnysizeError, InputError
from anysize.io.card import CARD
from anysize.io.data_identity import data_contents, same_data
from anysize.io.hub import local_folder, open_checkpoint
from anysize.io.image_processor import image_processor_of, require_same_images
from anysize.io.lock import FolderLock
from anysize.io.models import quiet_transformers
from anysize.io.provenance import companions
from anysize.io.whole import read_json, told_of_disk, write_json
from anysize.layers import LEAVE_ONE_OUT
from anysize.processes import first_process_first, leave_at_the_end, rank_and_world, wait_for_all
from anysize.progress import Progress, quiet
from anysize.target import public_sizes
from anysize.tensors import num_parameters
from anysize.training.arguments import (
    examples_a_step,
    fixed_arguments,
    require_buildable,
    training_arguments,
    with_defaults,
)
from anysize.training.card import training_card
from anysize.training.clock import clock_of, peak_of, seconds_of
from anysize.training.config import Calibration, TrainConfig
from anysize.training.data import Datasets, datasets_of, shared_files
from anysize.training.loop import (
    Outcome,
    last_checkpoint,
    make_teacher,
    require_shards,
    require_trainable,
    run,
)
from anysize.training.memory import training_memory
from anysize.training.optimizer_state import require_growth, require_kept, require_recipe, require_state, save_state
from anysize.training.start import (
    Start,
    StartFolder,
    at_random,
    beside_weights,
    folder_of,
    load,
    plan_of,
    require_same_tokens,
    require_same_vocabulary,
    scores_from,
    tokenizer_bytes,
)

if TYPE_CHECKING:
    from anysize.training.trainer import Teacher

_RECORD = "anysize-train.json"
# The folder in it of what a resize makes.
_START = "start"


def _held_out(config: TrainConfig) -> dict[str, Any]:
    """Return how often the held-out data are measured where the config is silent."""
    if not (config.data.validation or config.data.test) or "eval_strategy" in config.training:
        return {}
    return {"eval_strategy": "steps", "eval_steps": config.training.get("eval_steps", 100)}


def _made_of(config: TrainConfig) -> dict[str, str]:
    """Return what tells whether the data and the models of a run are still those that it began with.

    By what is in them, wherever they lie: a run may go on on another machine.
    """
    resize, calibration = config.resize, config.resize.calibration if config.resize else None
    data = {f"data.{name}": getattr(config.data, name) for name in ("train", "validation", "test")}
    data["resize.calibration"] = calibration.data if isinstance(calibration, Calibration) else calibration or ""
    models = {"model": config.model, "distill.teacher": config.distill.teacher if config.distill else "",
              "resize.source": resize.source if resize else ""}  # fmt: skip
    return (
        {name: data_contents(path) for name, path in data.items() if path}
        | {name: model_sha256(open_checkpoint(model)) for name, model in models.items() if model}
        | {f"config or tokenizer of {name}": beside_weights(place)
           for name, place in {**models, "random": config.random}.items() if place}
        | ({"data.tokenizer": sha256(tokenizer_bytes(own)).hexdigest()} if (own := config.data.tokenizer) else {})
        | _image_processors({**models, "random": config.random})
    )  # fmt: skip


def _image_processors(models: Mapping[str, str]) -> dict[str, str]:
    """Return how those of these models that read images have them prepared."""
    found: dict[str, str] = {}
    for name, place in models.items():
        if place:
            understood = understand(read_config(local_folder(place, without_weights=True)))
            if understood.architecture.modality == "image":
                settings = image_processor_of(place, understood).settings
                found[f"image processor of {name}"] = json.dumps(settings, sort_keys=True)
    return found


class _Folder:
    """The folder of a run: who made it, and whether it is done."""

    def __init__(self, config: TrainConfig, num_examples: int) -> None:
        """num_examples: of one step of all processes, of which the config knows but one."""
        self.path = Path(config.output).expanduser()
        self._num_examples = num_examples
        self._is_new = False
        self._lock: FolderLock | None = None
        self._config = json.loads(config.model_dump_json(exclude={"output"}))
        self._made_of = _made_of(config)

    def claim(self) -> dict[str, Any] | None:
        """Take the folder, or return the record of the same run where it is finished; refuse any other folder."""
        self._lock = FolderLock.of_runs(self.path, _RECORD, "run")
        try:
            known = self._claimed()
        except InputError:
            self.release()
            raise
        if known is not None:
            self.release()
        return known

    def _claimed(self) -> dict[str, Any] | None:
        record = self.path / _RECORD
        self._is_new = not record.is_file()
        if record.is_file():
            known = read_json(record, "config", "finished", fix="choose another output, or put back the file as it was")
            if known["config"] != self._config:
                changed = sorted(k for k in {*known["config"], *self._config}
                                 if known["config"].get(k) != self._config.get(k))  # fmt: skip
                raise InputError(
                    f"the output '{self.path}' is of another config ({', '.join(changed)} differ): choose another one"
                )
            before = known.get("made_of", {})
            if changed := [name for name, now in self._made_of.items() if not same_data(before.get(name, now), now)]:
                raise InputError(
                    f"the output '{self.path}' was made of other files ({', '.join(changed)} changed since): choose "
                    "another one"
                )
            if (then := known.get("examples_a_step", self._num_examples)) != self._num_examples:
                raise InputError(
                    f"the output '{self.path}' is of a run with {then} examples a step, and here are "
                    f"{self._num_examples}: start as many processes as then, or choose another output"
                )
            return known if known["finished"] else None
        self.write(finished=False, found={})
        return None

    def release(self) -> None:
        """Let another process take the folder."""
        if self._lock is not None:
            self._lock.release()

    def withdraw(self, *, refused: bool) -> None:
        """Remove what a run that could not begin has made; a start that is whole only where the config was refused,
        and no other process may be about to read it."""
        kept = (not refused or rank_and_world()[1] > 1) and StartFolder(self.path / _START).is_whole
        if self._is_new and last_checkpoint(self.path) is None and not kept:
            shutil.rmtree(self.path, ignore_errors=True)

    def write(self, *, finished: bool, found: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record, whole or not at all."""
        told = {"finished": finished, "config": self._config, "examples_a_step": self._num_examples,
                "made_of": self._made_of, **found}  # fmt: skip
        write_json(self.path / _RECORD, told)
        return told


def _claimed(folder: _Folder, state: Any) -> dict[str, Any] | None:
    """Return what the first process finds in the folder, in every process; all raise where it is refused."""
    from accelerate.utils import broadcast_object_list  # noqa: PLC0415

    told: list[Any] = [None, None]
    if state.is_main_process:
        try:
            told[0] = folder.claim()
        except InputError as error:
            told[1] = error
    broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def _start(
    config: TrainConfig, target: SourceConfig, tokenizer: str, state: Any, seed: int, progress: Progress, command: str
) -> Start:
    """Return what a run starts from; what a plan makes is made by the first process and read by all."""
    clock = clock_of(state.device)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    if config.resize is not None:
        place = StartFolder(Path(config.output).expanduser() / _START)
        if state.is_main_process and not place.is_whole:
            scores = scores_from(
                config.resize.source, config.resize.calibration, config.data, progress,
                leave_one_out=config.resize.layers == LEAVE_ONE_OUT,
            )  # fmt: skip
            place.write(config.resize, scores, clock, progress, command)
        wait_for_all()
        return place.start(dtype)
    if config.model:
        return Start(load(config.model, dtype), target, tokenizer)
    return at_random(target, tokenizer, seed, dtype)


def _target(config: TrainConfig) -> tuple[SourceConfig, str]:
    """Return the config that will be trained, and the folder of its tokenizer, before anything is made or loaded.

    The target of a resize that shrinks is planned without its calibration, which chooses coordinates but no sizes.
    """
    if config.resize is not None:
        plan = plan_of(config.resize.sizes_alone(), None, quiet)
        return understand(plan.target_config), folder_of(open_checkpoint(config.resize.source))
    folder = local_folder(config.model or config.random, without_weights=True)
    return understand(read_config(folder)), str(folder)


def _taught_by(config: TrainConfig, student: SourceConfig, home: str) -> SourceConfig | None:
    """Return the config of the teacher; raise InputError where words, or pixels, would be others for it.

    home: where the student's tokenizer, or image processor, lies.
    """
    if config.distill is None:
        return None
    location = config.distill.teacher or (config.resize.source if config.resize else "")
    folder = local_folder(location, without_weights=True)
    teacher = understand(read_config(folder))
    require_same_vocabulary(student, teacher, location)
    if config.distill.hidden_weight and config.resize is not None:
        _require_writer_maps(location, config.resize.source)
    if student.architecture.modality == "image":
        both = image_processor_of(home, student), image_processor_of(location, teacher)
        require_same_images(*both, f"the student and the teacher '{location}'")
    else:
        require_same_tokens(config.data.tokenizer or home, str(folder), location)
    return teacher


def _require_writer_maps(teacher: str, source: str) -> None:
    """Refuse the stream of a teacher that is not the source of the plan, whatever both are called."""
    if teacher != source and model_sha256(open_checkpoint(teacher)) != model_sha256(open_checkpoint(source)):
        raise InputError(f"distill.hidden_weight: the writer maps are of '{source}', and the teacher is '{teacher}'")


def _teacher(config: TrainConfig, start: Start, data: Datasets, args: Any) -> Teacher | None:
    if config.distill is None:
        return None
    return make_teacher(config.distill, config.resize.source if config.resize else "", data, start, args)


def _keep_optimizer(trainer: Any, folder: Path) -> None:
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    save_state(trainer.accelerator.unwrap_model(trainer.model), optimizer, folder)


def _save(
    config: TrainConfig, outcome: Outcome, start: Start, found: Mapping[str, Any], folder: Path, command: str
) -> None:
    """Write the trained model with what lies beside a checkpoint, as a folder that any loader takes."""
    trainer = outcome.trainer
    with told_of_disk(f"cannot save the trained model in '{folder}'", "make room, and the same command goes on"):
        with quiet_transformers():
            trainer.save_model(str(folder))
        # A pickle, which nothing of ours reads.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if trainer.is_world_process_zero():
            for name, content in companions(Path(start.tokenizer)):
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(content)
            if config.keep_optimizer:
                _keep_optimizer(trainer, folder)
            (folder / CARD).write_text(training_card(config, start, found, command), encoding="utf-8")


def train(config: TrainConfig, *, command: str, origin: str, progress: Progress) -> dict[str, Any]:
    """Carry out a training config and return its record: losses, tokens a second, seconds; a finished run at once.

    The same config goes on from its last whole checkpoint. Raises InputError or OutputError for what cannot be used.
    """
    from accelerate import PartialState  # noqa: PLC0415

    if "eval_steps" in config.training and not (config.data.validation or config.data.test):
        raise InputError("training.eval_steps: there are no held-out data (data.validation, data.test)")
    # accelerate begins a group of all processes, and leaves its end to others.
    leave_at_the_end()
    given = with_defaults({**_held_out(config), **config.training})
    args = training_arguments({**given, **fixed_arguments(config.output)}, origin)
    require_buildable(args, origin)
    if config.keep_optimizer:
        require_kept(args)
    require_recipe(config.recipe, args)
    if config.distill is not None and args.max_steps > 0:
        config.distill.require_room(args.max_steps)
    if config.recipe.optimizer_state == "carried" and config.resize is not None:
        require_state(Path(folder_of(open_checkpoint(config.resize.source))), args, config.recipe)
    folder = _Folder(config, examples_a_step(args))
    state = PartialState()
    if state.num_processes != (world := rank_and_world()[1]):
        raise InputError(
            f"{world} processes were started and each trains alone, because there is no accelerator: set "
            "training.use_cpu to train on processors together, or start one process"
        )
    require_shards(args)
    if (known := _claimed(folder, state)) is not None:
        return known
    try:
        found = _trained(config, folder, args, state, command, progress)
        return folder.write(finished=True, found=found) if state.is_main_process else {}
    finally:
        folder.release()


def _trained(
    config: TrainConfig, folder: _Folder, args: Any, state: Any, command: str, progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Train, write the model into the folder and return what was found."""
    try:
        # Before a calibration, which may take long.
        target, tokenizer = _target(config)
        _taught_by(config, target, tokenizer)
        if config.resize is not None:
            source = understand(open_checkpoint(config.resize.source).config)
            require_growth(config.recipe, source, target, untie=config.resize.untie)
        with first_process_first():
            data = datasets_of(config.data, target, tokenizer, examples_a_step(args), progress)
        require_trainable(data, args, config.distill)
        start = _start(config, target, tokenizer, state, args.seed, progress, command)
        outcome = run(
            start, data, args, teacher=_teacher(config, start, data, args), recipe=config.recipe, flip=config.data.flip,
            progress=progress,
        )  # fmt: skip
    except Exception as error:
        if state.is_main_process:
            folder.withdraw(refused=isinstance(error, AnysizeError))
        raise
    if outcome.status == "diverged":
        raise InputError(
            f"training diverged at step {outcome.step}: a loss was not finite; give a lower learning rate, or a longer "
            f"warm-up (the run is in '{folder.path}')"
        )
    images = target.architecture.modality == "image"
    found = {**_found(outcome, start, data), "notes": shared_files(config.data, images=images)}
    _save(config, outcome, start, found, folder.path, command)
    return found


def _found(outcome: Outcome, start: Start, data: Datasets) -> dict[str, Any]:
    history = outcome.trainer.state.log_history
    last = next((entry for entry in reversed(history) if "train_runtime" in entry), {})
    args = outcome.trainer.args
    device, peak = peak_of(args.device)
    speed = outcome.flops_per_s
    examples = outcome.step * examples_a_step(args)
    measured = outcome.curve[max(outcome.curve)] if outcome.curve else {}
    return {
        "status": outcome.status, "steps": outcome.step, "tokens": examples * data.tokens_each,
        "curve": {str(step): losses for step, losses in outcome.curve.items()},
        "bits_per_byte": {name: measured[name] * bits for name, bits in data.bits_per_byte.items() if name in measured},
        "calibration_s": start.calibration_s, "conversion_s": start.conversion_s, "train_s": outcome.train_s,
        "teacher_s": outcome.teacher_s, "wall_s": last.get("train_runtime"),
        "flops_per_s": speed, "device": device, "utilization": speed / peak if speed and peak else None,
        "seconds": seconds_of(args.device), "unit": start.config.architecture.counts,
        "losses": [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry],
    }  # fmt: skip


def foreseen(config: TrainConfig, origin: str) -> dict[str, Any]:
    """Return what a run would be: sizes, tokens a step, and bytes on each of some numbers of devices.

    On any machine, whatever the config asks of the one that it is for.
    """
    asked = {**with_defaults(config.training), **fixed_arguments(config.output), "use_cpu": True}
    # Refused where there is no GPU of its kind, and of no weight here.
    asked.pop("tf32", None)
    args = training_arguments(asked, origin)
    understood, home = _target(config)
    teacher = _taught_by(config, understood, home)
    batch, image = args.per_device_train_batch_size, understood.architecture.modality == "image"
    length = understood.sizes["position"] if image else config.data.sequence_length
    by_shards: Any = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    checkpointing = args.gradient_checkpointing or by_shards.get("activation_checkpointing") is True
    tables = {
        f"{shards} with FSDP" if shards > 1 else "1, or each under DDP": training_memory(
            understood, teacher, batch=batch, length=length, half=bool(args.bf16 or args.fp16),
            checkpointing=bool(checkpointing), shards=shards, apart=config.recipe.new_parameters is not None,
            weight_bytes=2 if config.dtype == "bfloat16" else 4,
        )
        # What has rates of its own element by element cannot be sharded.
        for shards in ((1,) if config.recipe.new_parameters else (1, 2, 4, 8, 16, 32, 64))
    }  # fmt: skip
    return {
        "num_parameters": num_parameters(understood), "sizes": public_sizes(understood),
        "unit": understood.architecture.counts,
        "tokens_a_step_each": batch * (1 if image else length) * args.gradient_accumulation_steps,
        "memory_bytes": {name: {**asdict(found), "total": found.total} for name, found in tables.items()},
    }  # fmt: skip
