"""What a run starts from: a checkpoint, a config initialized at random, or a plan that is made and applied first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize import api
from anysize.config import SourceConfig, read_config, understand
from anysize.errors import CheckpointError, InputError
from anysize.io.hub import local_folder, open_checkpoint
from anysize.io.models import building, config_of, model_class, new_model, other_ids, quiet_transformers
from anysize.io.reader import TensorSource
from anysize.io.whole import read_json, told_of_disk, write_json
from anysize.progress import Progress
from anysize.proof.coverage import check_source
from anysize.recipe import Plan
from anysize.target import parse_count
from anysize.training.clock import Clock
from anysize.training.config import Calibration, Data, Resize
from anysize.vocabulary.tokenizer_file import TOKENIZER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anysize.calibration.scores import Scores


@dataclass
class Start:
    """A model to train, the plan that made it if one did, and the seconds of calibration and conversion.

    tokenizer: the folder where its tokenizer lies.
    """

    model: PreTrainedModel
    config: SourceConfig
    tokenizer: str
    plan: Plan | None = None
    calibration_s: float = 0.0
    conversion_s: float = 0.0


def folder_of(tensors: TensorSource) -> str:
    """Return the folder of a checkpoint that was opened by folder or Hub id."""
    return str(getattr(tensors, "folder", tensors.location))


def load(location: str, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a folder or Hub id; raise CheckpointError where it is none that we understand."""
    tensors = open_checkpoint(location)
    config = understand(tensors.config)
    settings = config_of(tensors.config)
    with quiet_transformers(), building(config.model_class):
        made: Any = model_class(config.model_class).from_pretrained(
            folder_of(tensors), config=settings, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return _with_experts_at_once(made, config)


def _with_experts_at_once(model: Any, config: SourceConfig) -> PreTrainedModel:
    """Return a model whose experts run together where the fused kernels take them, one by one elsewhere.

    The same for every start, so that seconds can be compared. The kernels want rows of a multiple of 16 bytes, in
    whatever precision a run computes.
    """
    if "expert" in config.sizes:
        fits = all(config.sizes[axis] % 8 == 0 for axis in ("hidden", "ffn"))
        model.set_experts_implementation("grouped_mm" if fits else "eager")
    return model


def beside_weights(location: str) -> str:
    """Return a hash of a model's config and tokenizer, wherever it lies: other ones make another run of its weights."""
    config = read_config(local_folder(location, without_weights=True))
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode() + tokenizer_bytes(location)).hexdigest()


def tokenizer_bytes(location: str) -> bytes:
    """Return the tokenizer of a folder or Hub id as it lies there; nothing where there is none of this form."""
    place = local_folder(location, without_weights=True) / TOKENIZER
    return place.read_bytes() if place.is_file() else b""


def taken_up(model: Any, checkpoint: str) -> None:
    """Put the weights of a checkpoint of the same model into it, every one, in place.

    Read as any checkpoint is: on disk tensors may have other names, and be others (experts), than in memory. Raises
    CheckpointError where the checkpoint does not hold the model's weights.
    """
    tensors = open_checkpoint(checkpoint)
    # transformers makes up what is missing.
    check_source(understand(tensors.config), tensors)
    try:
        model.load_state_dict(load(checkpoint, next(model.parameters()).dtype).state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"'{checkpoint}' does not hold the weights of this model: {why}") from error


def calibration_of(asked: Calibration, config: SourceConfig) -> Calibration:
    """Return a calibration with what it does not say filled in for a source: tokens or images, and their length."""
    from anysize.calibration.data import default_items, default_length  # noqa: PLC0415

    found = {"tokens": default_items(config), "sequence_length": default_length(config)}
    return asked.model_copy(update={name: n for name, n in found.items() if name not in asked.model_fields_set})


def scores_from(
    source: str,
    calibration: Calibration | str | None,
    data: Data,
    progress: Progress,
    *,
    leave_one_out: bool = False,
) -> Callable[[], Scores] | None:
    """Return how to come by the scores that a resize is chosen by, once its sizes are known to be legal; or None."""
    from anysize.calibration.calibrate import CalibrationOptions, calibrated  # noqa: PLC0415
    from anysize.calibration.data import DataOptions  # noqa: PLC0415
    from anysize.calibration.scores import Scores  # noqa: PLC0415

    if calibration is None:
        return None
    if isinstance(calibration, str):
        if calibration.endswith(".safetensors"):
            return partial(Scores.load, Path(calibration).expanduser())
        calibration = Calibration(data=calibration)
    tensors = open_checkpoint(source)
    calibration = calibration_of(calibration, understand(tensors.config))
    asked = DataOptions(
        calibration.tokens, calibration.sequence_length, calibration.batch_size, calibration.column or data.column,
        data.label_column if leave_one_out else DataOptions().label_column,
    )  # fmt: skip
    # One process makes what all start from.
    options = CalibrationOptions(asked, leave_one_out=leave_one_out, shared=False)
    text = calibration.data or data.train
    return partial(calibrated, tensors, text, options, tokenizer=data.tokenizer, progress=progress)


def plan_of(resize: Resize, scores: Callable[[], Scores] | None, progress: Progress) -> Plan:
    """Return the plan of a resize."""
    params = resize.num_params
    return api.plan(
        resize.source, hidden_size=resize.hidden_size, intermediate_size=resize.intermediate_size,
        num_hidden_layers=resize.num_hidden_layers, num_attention_heads=resize.num_attention_heads,
        num_key_value_heads=resize.num_key_value_heads, head_dim=resize.head_dim, vocab_size=resize.vocab_size,
        num_experts=resize.num_experts, scale=resize.scale,
        num_params=None if params is None else parse_count(str(params)), like=resize.like, preset=resize.preset,
        calibration=scores, select=resize.select, readers=resize.readers, layers=resize.layers,
        search_tokens=resize.search_tokens, noise_db=resize.noise_db, seed=resize.seed,
        untie=resize.untie, stream_scale=resize.stream_scale, progress=progress,
    )  # fmt: skip


@dataclass(frozen=True)
class StartFolder:
    """What a resize makes for training: `model`, a plain checkpoint, and beside it its plan and what it took.

    The model has a folder of its own, because loaders take every .safetensors file beside a config for weights.
    """

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def _plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def _made(self) -> Path:
        return self.path / "made.json"

    @property
    def is_whole(self) -> bool:
        """Whether everything is there: what it took is written last."""
        return self._made.is_file()

    def write(
        self, resize: Resize, scores: Callable[[], Scores] | None, clock: Clock, progress: Progress, command: str
    ) -> None:
        """Make and write all of it; what a killed process left half written is written again."""
        begin, calibration_s = clock(), 0.0

        def measured() -> Scores:
            nonlocal calibration_s
            assert scores is not None
            start = clock()
            found = scores()
            calibration_s = clock() - start
            return found

        plan = plan_of(resize, scores and measured, progress)
        with told_of_disk(f"cannot make the start '{self.path}'"):
            self.path.mkdir(parents=True, exist_ok=True)
        api.apply(plan, self.model, source=resize.source, overwrite=True, command=command, progress=progress)
        plan.save(self._plan)
        conversion_s = clock() - begin - calibration_s
        write_json(self._made, {"calibration_s": calibration_s, "conversion_s": conversion_s})

    @property
    def seconds(self) -> dict[str, float]:
        """What it took: calibration_s and conversion_s."""
        return read_json(self._made, "calibration_s", "conversion_s")

    @property
    def plan(self) -> Plan:
        """The plan that made the model."""
        return Plan.load(self._plan)

    def start(self, dtype: torch.dtype) -> Start:
        """Return what was written as a start; raise CheckpointError where it was damaged since."""
        try:
            plan, model = self.plan, str(self.model)
            return Start(load(model, dtype), understand(plan.target_config), model, plan, **self.seconds)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; remove the folder '{self.path}', and the same command makes it again"
            ) from error


def at_random(config: SourceConfig, tokenizer: str, seed: int, dtype: torch.dtype) -> Start:
    """Return a model of a config as transformers initializes it under a seed."""
    torch.manual_seed(seed)
    made = new_model(config.model_class, config.full, dtype)
    return Start(_with_experts_at_once(made, config), config, tokenizer)


def require_same_vocabulary(student: SourceConfig, teacher: SourceConfig, name: str) -> None:
    """Refuse a teacher whose tokens, or classes, are not the student's."""
    if student.architecture.modality != teacher.architecture.modality:
        raise InputError(
            f"the teacher '{name}' reads {teacher.architecture.modality}s and the student "
            f"{student.architecture.modality}s: they cannot be compared"
        )
    ours, theirs = num_classes(student), num_classes(teacher)
    if ours != theirs:
        raise InputError(
            f"the teacher '{name}' has {theirs:,} tokens or classes and the student {ours:,}: distillation needs the "
            "same vocabulary"
        )


def require_same_tokens(ours: str, theirs: str, name: str) -> None:
    """Refuse a teacher to which a word is another token than where the data are read; both are folders.

    A teacher without a tokenizer is taken at its word: its tokens are as many.
    """
    if (Path(theirs) / TOKENIZER).is_file() and (differ := other_ids(ours, theirs)):
        raise InputError(
            f"the tokenizer of the teacher '{name}' is not that of the data: {differ}, and distillation needs the same "
            "vocabulary"
        )


def num_classes(config: SourceConfig) -> int:
    """Return how many tokens, or classes of images, a model tells apart."""
    return config.full["num_labels"] if config.architecture.modality == "image" else config.sizes["vocab"]
