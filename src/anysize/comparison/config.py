"""What a YAML file may ask of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from anysize.errors import did_you_mean, joined
from anysize.layers import LEAVE_ONE_OUT
from anysize.recipe import StreamScale
from anysize.training.config import (
    Calibration,
    Data,
    Distill,
    Recipe,
    Resize,
    Section,
    Sizes,
    check_training_arguments,
)
from anysize.training.config_file import refusals

# What one arm may not have for itself: all arms see the same tokens, on one kind of device.
_SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy",
           "accelerator_config", "use_cpu")  # fmt: skip
# What no config of a comparison may have: it follows from other keys, or would change the tokens of a step unseen.
_OURS = {
    "seed": "seeds", "data_seed": "seeds", "learning_rate": "learning_rates", "num_train_epochs": "max_steps",
    "eval_steps": "evaluations", "eval_strategy": "evaluations", "eval_delay": "evaluations",
    "eval_on_start": "evaluations", "logging_steps": "evaluations",
    "auto_find_batch_size": "per_device_train_batch_size, the same for every arm",
    "load_best_model_at_end": "evaluations: figures are of every one of them",
}  # fmt: skip


class SourceCost(Section):
    """What the source's own training took, where it is known; shares are then told with and without it."""

    train_s: float | None = Field(default=None, ge=0)
    train_flops: float | None = Field(default=None, ge=0)
    train_tokens: float | None = Field(default=None, ge=0)


class ArmConfig(Section):
    """One arm.

    random: a fresh model of the target's sizes instead of a resized source. preset to stream_scale: see `anysize
    resize`. source: another source than the comparison's, and source_cost what its training took. distill, recipe: see
    training. training: TrainingArguments of this arm alone, such as weight_decay, or fewer max_steps with a schedule of
    their own. learning_rates: another grid.
    """

    random: bool = False
    source: str = ""
    source_cost: SourceCost = Field(default_factory=SourceCost)
    preset: str = "auto"
    select: str = "auto"
    readers: str = "auto"
    layers: str = "auto"
    noise_db: float = 10.0
    untie: bool = False
    stream_scale: StreamScale = 1.0
    distill: Distill | None = None
    recipe: Recipe = Field(default_factory=Recipe)
    training: dict[str, Any] = Field(default_factory=dict)
    learning_rates: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> ArmConfig:
        if self.random and (
            given := self.model_fields_set
            & {"preset", "select", "readers", "layers", "source", "untie", "noise_db", "stream_scale"}
        ):
            raise ValueError(f"a random start takes no {joined(sorted(given))}")
        if self.random and self.recipe.optimizer_state == "carried":
            raise ValueError("recipe.optimizer_state: a random start has no source whose state it could carry")
        if not self.source and "source_cost" in self.model_fields_set:
            raise ValueError("source_cost: an arm without a source of its own costs what the comparison's does")
        if self.distill is not None and self.distill.cache:
            raise ValueError("distill.cache: later runs would have their teacher for nothing, and seconds are compared")
        if self.random and self.distill is not None and self.distill.hidden_weight:
            raise ValueError("distill.hidden_weight: needs the writer maps of a plan, and a random start has none")
        if self.random and self.recipe.new_parameters is not None:
            raise ValueError("recipe.new_parameters: all values of a random start are new")
        _refuse_ours(self.training)
        if shared := [name for name in _SHARED if name in self.training]:
            raise ValueError(f"training.{joined(shared)}: all arms share it")
        return self

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return _checked_rates(rates)


def _refuse_ours(training: Mapping[str, Any]) -> None:
    if wrong := [f"training.{name}: told by {told}" for name, told in _OURS.items() if name in training]:
        raise ValueError(joined(wrong))


def _checked_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    if wrong := [rate for rate in rates if rate <= 0]:
        raise ValueError(f"learning rates of {joined(map(str, wrong))}: wanted more than 0")
    if len(set(rates)) != len(rates):
        raise ValueError("a learning rate stands twice")
    return tuple(sorted(rates))


def _require_steps(steps: object, where: str, whose: str) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{where} is {steps!r}: wanted how many steps {whose}, at least 1")


class CompareConfig(Section):
    """A comparison: every arm over the same tokens.

    source: the folder or Hub id that arms are made from, and their teacher. target: the sizes that all arms have.
    training: options of transformers.TrainingArguments that all arms share; max_steps is needed. evaluations: how often
    the held-out data are measured, at least. learning_rates: tried with the first seed and chosen on the validation
    data; halving: rates that lag are given up on the way. goals: arms whose final loss the others are measured against.
    source_cost: of the source's own training. workers: runs at a time; one a GPU, or one a core, where it is None.
    """

    title: str = ""
    output: str = Field(min_length=1)
    source: str
    target: Sizes
    data: Data
    calibration: Calibration = Field(default_factory=Calibration)
    training: dict[str, Any] = Field(default_factory=dict)
    evaluations: int = Field(default=30, ge=1)
    learning_rates: tuple[float, ...] = Field(min_length=1)
    halving: bool = True
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    arms: dict[str, ArmConfig] = Field(min_length=1)
    goals: tuple[str, ...] = ("random",)
    source_cost: SourceCost = Field(default_factory=SourceCost)
    workers: int | None = Field(default=None, ge=1)

    @field_validator("learning_rates")
    @classmethod
    def _positive(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        return _checked_rates(rates)

    @model_validator(mode="after")
    def _sound(self) -> CompareConfig:
        if unknown := [goal for goal in self.goals if goal not in self.arms]:
            near = did_you_mean(unknown[0], self.arms)
            raise ValueError(f"goals: there is no arm '{unknown[0]}'{near}; the arms are {joined(self.arms)}")
        _require_steps(self.training.get("max_steps"), "training.max_steps", "every arm takes")
        for name, arm in self.arms.items():
            if "max_steps" in arm.training:
                _require_steps(arm.training["max_steps"], f"arms.{name}.training.max_steps", "it takes")
        if not self.data.validation:
            raise ValueError("data.validation is missing: learning rates are chosen on it")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds: one stands twice")
        if odd := [seed for seed in self.seeds if not 0 <= seed < 2**32]:
            raise ValueError(f"seeds: {odd[0]}, wanted 0 to {2**32 - 1}")
        if self.data.streaming:
            raise ValueError("data.streaming: every arm has to see the same tokens, so they are kept; leave it out")
        _refuse_ours(self.training)
        for name, arm in self.arms.items():
            teacher = arm.distill.teacher or self.source if arm.distill and arm.distill.hidden_weight else arm.source
            if arm.source and teacher != arm.source:
                raise ValueError(
                    f"arms.{name}.distill.hidden_weight: the writer maps are of '{arm.source}', and the teacher is "
                    f"'{teacher}': name it as distill.teacher"
                )
        return self

    def resize_of(self, arm: str, seed: int) -> Resize:
        """Return the resize that an arm starts from."""
        asked = self.arms[arm]
        return Resize(
            source=asked.source or self.source, **self.target.model_dump(), preset=asked.preset, select=asked.select,
            readers=asked.readers, layers=asked.layers, noise_db=asked.noise_db, untie=asked.untie,
            stream_scale=asked.stream_scale, seed=seed,
        )  # fmt: skip

    def models_of(self, arm: str) -> tuple[str, ...]:
        """Return the models that an arm has for itself: its own source, and a teacher that is not the comparison's."""
        asked = self.arms[arm]
        named = (asked.source, asked.distill.teacher if asked.distill else "")
        return tuple(dict.fromkeys(name for name in named if name and name != self.source))

    def source_cost_of(self, arm: str) -> SourceCost:
        """Return what the models took that an arm starts from or learns from; nothing for a random start alone."""
        asked = self.arms[arm]
        costs = {self.source: self.source_cost}
        if asked.source and (asked.source != self.source or "source_cost" in asked.model_fields_set):
            costs[asked.source] = asked.source_cost
        used = set() if asked.random else {asked.source or self.source}
        if asked.distill is not None:
            used.add(asked.distill.teacher or self.source)
        found = [costs.get(model, SourceCost()).model_dump() for model in sorted(used)]
        sums: dict[str, float | None] = {}
        for name in SourceCost.model_fields:
            known = [cost[name] for cost in found if cost[name] is not None]
            sums[name] = sum(known) if len(known) == len(found) else None
        return SourceCost(**sums)

    def leaves_one_out(self, arm: str) -> bool:
        """Whether the layers of an arm are chosen by the loss without each of them."""
        return self.arms[arm].layers == LEAVE_ONE_OUT

    @property
    def split(self) -> str:
        """The held-out data that figures are of; rates are chosen on the validation data."""
        return "test" if self.data.test else "validation"

    def rates_of(self, arm: str) -> tuple[float, ...]:
        """Return the learning rates that an arm tries."""
        return self.arms[arm].learning_rates or self.learning_rates

    def training_of(self, arm: str) -> dict[str, Any]:
        """Return the training arguments of an arm, without rate and seed."""
        return {**self.training, **self.arms[arm].training}

    def steps_of(self, arm: str) -> int:
        """Return how many steps an arm takes."""
        return int(self.training_of(arm)["max_steps"])


def compare_config(raw: Mapping[str, Any], origin: str) -> CompareConfig:
    """Return a mapping as a config; raise InputError naming everything that is wrong with it."""
    try:
        made = CompareConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise refusals(error, CompareConfig, origin) from error
    of_arms = {f"arms.{name}.training": arm.training for name, arm in made.arms.items()}
    check_training_arguments({"training": made.training, **of_arms}, origin)
    return made
