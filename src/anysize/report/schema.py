"""Results: what a comparison found, as data. The report, the cards and the published tables are made of this alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from anysize.errors import InputError, did_you_mean
from anysize.io.whole import write_json

FORMAT = 1
Status = Literal["finished", "trial", "diverged"]


# What was measured may be anything: a loss need not be finite.
Measured = Annotated[float, Field(allow_inf_nan=True)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Metric(_Record):
    """What is measured on held-out data: lower is better.

    name: "loss" or "error rate". unit: "nats/token", "nats/image" or "share of images". bits_per_byte: what a loss is
    multiplied by to be bits/byte of the test text; None for images.
    """

    name: str
    unit: str
    bits_per_byte: float | None = None


class Kept(_Record):
    """Which coordinates of one axis a target kept: a row for every layer (or one for all), each a list of indices."""

    axis: str
    source_size: int
    rows: dict[str, tuple[int, ...]]


class PlanRecord(_Record):
    """A plan as a reader wants to see it.

    tensors: rows of (tensor, reads -> writes, source shape, target shape, how, count). layers: for every layer of the
    target the source layer that it comes from. directions: where `hidden` was turned to directions, how much of each
    source coordinate (column) every group of kept directions (row) draws on, at most 64 x 64, rows adding up to 1.
    """

    tensors: tuple[tuple[str, str, str, str, str, int], ...]
    exact: bool
    notes: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    num_source_layers: int = 0
    kept: tuple[Kept, ...] = ()
    directions: tuple[tuple[float, ...], ...] = ()


class Arm(_Record):
    """One line of the comparison: what it starts from, how it is trained, what it costs before and beside training.

    start: a sentence. command: what makes the same start by hand; empty where nothing is made. flops_a_token: of
    training (forward and backward) the arm alone; teacher_flops_a_token: of the teacher's forward pass, 0 without one;
    for teacher_steps steps, or all where it is None. calibration_flops, conversion_flops: of the forward
    passes in which the source, and the target that follows it, are looked at, once.
    source_train_s, source_train_flops: of the source that it is made from or learns from; None where nobody knows.
    """

    name: str
    start: str
    command: str
    num_parameters: int
    sizes: dict[str, int]
    settings: dict[str, Any]
    calibration_s: float = 0.0
    conversion_s: float = 0.0
    flops_a_token: float = 0.0
    teacher_flops_a_token: float = 0.0
    calibration_flops: float = 0.0
    conversion_flops: float = 0.0
    source_train_s: float | None = None
    source_train_flops: float | None = None
    teacher_steps: int | None = None
    plan: PlanRecord | None = None

    def taught(self, steps: float) -> float:
        """Return in how many of the first steps the teacher is listened to."""
        return steps if self.teacher_steps is None else min(steps, self.teacher_steps)


class Run(_Record):
    """One training run: what was measured after so many steps (`at`), on validation and on test data.

    status: "trial" for a shorter run, with a schedule of its own, by which the search of the rate judged it; "diverged"
    where a loss was not finite. steps: how many its schedule has.
    train_s, teacher_s (its share of it): seconds of training alone, of the processor on a CPU, of the clock on a GPU.
    first_s (its share of it): the first step, in which models are compiled, whatever the steps after it.
    flops_per_s: model FLOPs a second, the teacher's included, in the median step; None where nobody counted.
    """

    arm: str
    seed: int
    learning_rate: float
    status: Status
    steps: int
    at: tuple[int, ...]
    validation: tuple[Measured, ...]
    test: tuple[Measured, ...]
    train_s: float
    teacher_s: float = 0.0
    first_s: float = 0.0
    flops_per_s: float | None = None

    @property
    def own_s(self) -> float:
        """Seconds of the steps after the first, without the teacher."""
        return self.train_s - self.teacher_s - self.first_s


class Reached(_Record):
    """What an arm needs to come to the final loss of another, absolute and as a share of that other's whole run.

    seconds include calibration, conversion and teacher, FLOPs calibration and teacher; the `_with_source` shares also
    the training of the source on either side, where its cost is known.
    """

    steps: float
    tokens: float
    flops: float
    seconds: float
    steps_share: float
    flops_share: float
    seconds_share: float
    flops_share_with_source: float | None = None
    seconds_share_with_source: float | None = None


class Row(_Record):
    """The summary of one arm at its best rate: medians over seeds.

    reached: by the name of a goal arm; None where not every seed came there. rise: the most that the loss on test data
    stood above where it started, in any seed.
    """

    arm: str
    learning_rate: float
    num_seeds: int
    num_diverged: int
    before: float
    after: float
    after_of_seeds: tuple[float, ...]
    rise: float
    train_s: float
    reached: dict[str, Reached | None]


class SourceRecord(_Record):
    """The model that arms are made from. The cost of its own training is there where the config tells it."""

    location: str
    num_parameters: int
    sizes: dict[str, int]
    test: Measured
    train_s: float | None = None
    train_flops: float | None = None
    train_tokens: float | None = None


class Results(_Record):
    """Everything that a comparison found. `complete` is False while runs are missing."""

    format: Literal[1] = FORMAT
    title: str
    complete: bool
    modality: Literal["text", "image"]
    metric: Metric
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    command: str
    config: str
    source: SourceRecord | None
    steps: int = Field(ge=1)
    tokens_a_step: int = Field(ge=1)
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    goals: tuple[str, ...]
    notes: tuple[str, ...] = ()
    arms: tuple[Arm, ...]
    runs: tuple[Run, ...]
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Results:
        """Refuse names that nothing stands for and curves of uneven length: nothing could be drawn of them."""
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"two arms have the same name: {', '.join(names)}")
        used = [*self.goals, *(run.arm for run in self.runs), *(row.arm for row in self.rows)]
        used += [goal for row in self.rows for goal in row.reached]
        if unknown := sorted(set(used) - set(names)):
            raise ValueError(f"no arm has the name '{unknown[0]}'{did_you_mean(unknown[0], names)}")
        for run in self.runs:
            if not len(run.at) == len(run.validation) == len(run.test):
                got = f"{len(run.at)}, {len(run.validation)} and {len(run.test)}"
                raise ValueError(f"a run of '{run.arm}' has {got} values of at, validation and test")
            if any(step < 0 for step in run.at) or list(run.at) != sorted(set(run.at)):
                raise ValueError(f"a run of '{run.arm}' was measured at {run.at}: wanted steps that rise from 0")
        return self

    @property
    def counted(self) -> str:
        """What examples are counted in: "tokens" or "images"."""
        return "images" if self.modality == "image" else "tokens"

    def steps_of(self, arm: str) -> int:
        """Return how many steps a whole run of an arm takes; those of the comparison where none has finished."""
        return next((run.steps for run in self.runs if run.arm == arm and run.status == "finished"), self.steps)

    @property
    def lengths(self) -> str:
        """How many steps the arms take, such as "800" or "240 to 800"."""
        found = sorted({self.steps_of(row.arm) for row in self.rows}) or [self.steps]
        return " to ".join(dict.fromkeys(f"{steps:,}" for steps in (found[0], found[-1])))

    def arm(self, name: str) -> Arm:
        """Return the arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def save(self, path: Path) -> None:
        """Write the results as JSON, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results from a file, or from the `results.json` of a folder; raise InputError where there are none."""
        place = path / "results.json" if path.is_dir() else path
        try:
            return cls.model_validate_json(place.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the results '{place}': {error}") from error
        except ValidationError as error:
            fields = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:3])
            raise InputError(f"'{place}' holds no results of a comparison: {fields}") from error
