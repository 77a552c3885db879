"""What a YAML file may ask of training. Every key is known, or refused with the nearest one that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from anysize.errors import InputError, did_you_mean, joined
from anysize.layers import EVOLUTIONARY, SCORED
from anysize.recipe import StreamScale
from anysize.training.arguments import check_training_arguments
from anysize.training.config_file import refusals

# What a role may be called in `recipe.learning_rate_factors`.
ROLES = ("embedding", "norm", "query-key", "value-output", "feed-forward", "other")


def _whole_or_share(asked: int | float) -> int | float:
    if isinstance(asked, float) and asked >= 1:
        raise ValueError(f"{asked}: wanted a whole number of steps, or a share of the run below 1")
    return asked


# Of a run: a whole number, or below 1 a share of them.
Steps = Annotated[int | float, AfterValidator(_whole_or_share)]


def in_steps(asked: Steps, whole: int) -> int:
    """Return how many steps of a run with so many are asked for."""
    return max(1, round(asked * whole)) if isinstance(asked, float) and asked else int(asked)


class Section(BaseModel):
    """A part of a config file: nothing unknown, nothing infinite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes true for 1.
        if isinstance(value, bool) and "bool" not in str(cls.model_fields[info.field_name or ""].annotation):
            raise ValueError(f"{str(value).lower()}, and it is nothing to switch on or off")
        return value


class Data(Section):
    """What is trained and measured on.

    train, validation, test: text files, folders, parquet, jsonl or Hub data sets; parquet with images and labels for
    an image model. column: the text column where there are several. label_column: the class of an image.
    sequence_length: tokens of one sequence. streaming: read the data while training, without a first pass over all of
    them. max_tokens: at most so many tokens (or images) of the training data; evaluation_tokens: of each of the others.
    tokenizer: where it lies, if not beside the model. flip: images are flipped at random.
    """

    train: str = Field(min_length=1)
    validation: str = ""
    test: str = ""
    column: str = ""
    label_column: str = "label"
    sequence_length: int = Field(default=512, ge=2)
    streaming: bool = False
    max_tokens: int | None = Field(default=None, ge=1)
    evaluation_tokens: int = Field(default=65_536, ge=1)
    tokenizer: str = ""
    flip: bool = True


class Calibration(Section):
    """What a shrunk start is calibrated on: the training data where `data` is empty, or a scores file."""

    data: str = ""
    tokens: int = Field(default=131_072, ge=1)
    sequence_length: int = Field(default=256, ge=2)
    batch_size: int = Field(default=8, ge=1)
    column: str = ""


class SelfData(Section):
    """The teacher's own words instead of the data's.

    prompt_tokens: of each sequence stay. temperature: at which the rest is sampled; 0 takes the likeliest token.
    """

    prompt_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0)


class Distill(Section):
    """Distillation from a teacher with the same vocabulary.

    teacher: a folder or Hub id; the source of the resize where empty. weight: of the KL to the teacher, the rest is
    the plain loss; 0 where only hidden_weight or self_data is wanted. temperature: of both distributions. until_step:
    afterwards the plain loss alone; a number below 1 is a share of the run's steps. fade_steps: over the last so many
    taught steps both weights fall evenly to nothing. top_k: of each distribution keep so many tokens and the rest as
    one; None keeps all. cache: a folder where the top-k targets of every sequence are kept for the next run.
    hidden_weight: of the distance between the residual streams, which the writer maps of the plan make comparable.
    self_data: the student learns what the teacher says after the beginning of each sequence; `cache` keeps that as
    well.
    """

    teacher: str = ""
    weight: float = Field(default=0.9, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    until_step: Steps | None = Field(default=None, gt=0)
    fade_steps: Steps = Field(default=0, ge=0)
    top_k: int | None = Field(default=None, ge=1)
    cache: str = ""
    hidden_weight: float = Field(default=0.0, ge=0)
    self_data: SelfData | None = None

    def steps_taught(self, steps: int) -> int:
        """Return how many of the steps of a run are taught."""
        return steps if self.until_step is None else min(in_steps(self.until_step, steps), steps)

    def share(self, step: int, steps: int) -> float:
        """Return what part of its weights the teacher has at a step of a run with so many: 1, falling to 0."""
        taught = self.steps_taught(steps)
        return min(1.0, max(0, taught - step) / max(1, in_steps(self.fade_steps, steps)))

    def require_prompts(self, length: int) -> None:
        """Refuse to leave the teacher nothing to say in sequences of such a length."""
        if self.self_data is not None and self.self_data.prompt_tokens >= length:
            raise InputError(
                f"distill.self_data.prompt_tokens is {self.self_data.prompt_tokens}, and a sequence has {length}: the "
                "teacher would have nothing to say"
            )

    def require_room(self, steps: int) -> None:
        """Refuse to fade for longer than a run of so many steps is taught."""
        fading, taught = in_steps(self.fade_steps, steps), self.steps_taught(steps)
        if fading > taught:
            raise InputError(
                f"distill.fade_steps is {fading} of {steps} steps, and the teacher is listened to for {taught} of "
                "them: give fewer"
            )

    @model_validator(mode="after")
    def _sound(self) -> Distill:
        if self.cache and not (self.weight and self.top_k) and not self.self_data:
            raise ValueError("cache keeps top-k targets, and the words of self_data: ask for either of them as well")
        if self.cache and self.top_k and self.weight and self.hidden_weight:
            raise ValueError("cache: with hidden_weight the teacher has to run anyway; leave one of them out")
        if not self.weight and (idle := self.model_fields_set & {"top_k", "temperature"}):
            raise ValueError(f"weight is 0: {joined(sorted(idle))} would do nothing")
        if not (self.weight or self.hidden_weight or self.self_data):
            raise ValueError("weight is 0: nothing would be learned from the teacher")
        if self.fade_steps and not (self.weight or self.hidden_weight):
            raise ValueError("weight is 0: fade_steps would do nothing, the words of self_data come or do not")
        return self


class NewParameters(Section):
    """Rates of their own for what a plan added, element by element.

    learning_rate_factor: multiplies the rate of new elements. warmup_steps: over which that of new elements rises from
    0 (the schedule of all goes on beside); a number below 1 is a share of the run's steps. old_learning_rate_factor,
    old_warmup_steps: the same for what came from the source.
    """

    learning_rate_factor: float = Field(default=1.0, ge=0)
    warmup_steps: Steps = Field(default=0, ge=0)
    old_learning_rate_factor: float = Field(default=1.0, ge=0)
    old_warmup_steps: Steps = Field(default=0, ge=0)

    def of_run(self, steps: int) -> NewParameters:
        """Return the same for a run of so many steps, with both warm-ups in steps."""
        warmups = {name: in_steps(getattr(self, name), steps) for name in ("warmup_steps", "old_warmup_steps")}
        return self.model_copy(update=warmups)


class Recipe(Section):
    """Departures from one learning rate for all.

    learning_rate_factors: by role. new_parameters: see NewParameters; needs a start that a plan makes.
    optimizer_state: "carried" takes the moments of AdamW that lie beside the source (keep_optimizer) through the plan;
    those of new elements are zero.
    """

    learning_rate_factors: dict[str, float] = Field(default_factory=dict)
    new_parameters: NewParameters | None = None
    optimizer_state: Literal["new", "carried"] = "new"

    @model_validator(mode="after")
    def _known_roles(self) -> Recipe:
        for role, factor in self.learning_rate_factors.items():
            if role not in ROLES:
                known = ", ".join(ROLES)
                raise ValueError(f"unknown role '{role}'{did_you_mean(role, ROLES)}; known: {known}")
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"the factor of '{role}' is {factor}: wanted 0 or more")
        return self


class Sizes(Section):
    """The sizes of a target: those of `anysize resize`; what is not named stays as it is."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    num_experts: int | None = None
    scale: float | None = None
    num_params: int | float | str | None = None
    like: str | None = None


class Resize(Sizes):
    """A plan that is made and applied before training: the options of `anysize resize`."""

    source: str
    preset: str = "auto"
    calibration: Calibration | str | None = None
    select: str = "auto"
    readers: str = "auto"
    layers: str = "auto"
    search_tokens: int = 2_000_000
    noise_db: float = 10.0
    seed: int = 0
    untie: bool = False
    stream_scale: StreamScale = 1.0

    def sizes_alone(self) -> Resize:
        """Return the resize that makes the same sizes by choices that need no data."""
        by_data = self.layers in (*SCORED, EVOLUTIONARY)
        kept = {name: getattr(self, name) for name in Sizes.model_fields}
        return Resize(source=self.source, layers="auto" if by_data else self.layers, untie=self.untie,
                      stream_scale=self.stream_scale, **kept)  # fmt: skip


class TrainConfig(Section):
    """One training run.

    Exactly one of model (a folder or Hub id to go on with), resize (a plan applied on the fly) and random (a folder or
    Hub id whose config is initialized at random). training: options of transformers.TrainingArguments by their names.
    keep_optimizer: the moments of AdamW are written beside the trained model, for a growth that carries them on.
    """

    output: str = Field(min_length=1)
    model: str = ""
    random: str = ""
    resize: Resize | None = None
    data: Data
    distill: Distill | None = None
    recipe: Recipe = Field(default_factory=Recipe)
    training: dict[str, Any] = Field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    keep_optimizer: bool = False

    @model_validator(mode="after")
    def _one_start(self) -> TrainConfig:
        given = [name for name in ("model", "random", "resize") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"wanted exactly one of model, random and resize, got {joined(given) or 'none'}")
        if self.distill and not self.distill.teacher and self.resize is None:
            raise ValueError("distill.teacher: only a resize has a source to distil from; name the teacher")
        if self.recipe.optimizer_state == "carried" and self.resize is None:
            raise ValueError("recipe.optimizer_state: only a start that a plan makes (resize) has a source")
        return self


def train_config(raw: Mapping[str, Any], origin: str) -> TrainConfig:
    """Return a mapping as a config; raise InputError naming everything that is wrong with it."""
    try:
        made = TrainConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise refusals(error, TrainConfig, origin) from error
    check_training_arguments({"training": made.training}, origin)
    return made
