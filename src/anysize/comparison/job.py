"""One run of a comparison, carried out in a process of its own."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from anysize.comparison.config import ArmConfig, CompareConfig
from anysize.comparison.folder import Place
from anysize.config import SourceConfig, understand
from anysize.io.hub import open_checkpoint
from anysize.io.whole import damaged, read_json, write_json
from anysize.progress import quiet
from anysize.report.schema import Run
from anysize.shrink import reads_scores
from anysize.training.arguments import examples_a_step, fixed_arguments, training_arguments, with_defaults
from anysize.training.clock import clock_of, device_of_run
from anysize.training.config import in_steps
from anysize.training.data import datasets_of
from anysize.training.start import Start, StartFolder, at_random, folder_of

_DEFAULTS: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "steps", "eval_on_start": True}


@dataclass(frozen=True)
class Job:
    """One arm at one rate under one seed for so many steps: all of the arm's, or fewer in a trial of the rate."""

    place: Place
    config: CompareConfig
    arm: str
    rate: float
    seed: int
    steps: int

    @property
    def folder(self) -> Path:
        return self.place.run(self.config, self.arm, self.rate, self.seed, self.steps)

    @property
    def start(self) -> StartFolder:
        return StartFolder(self.place.start(self.config, self.arm, self.seed))

    @property
    def is_trial(self) -> bool:
        return self.steps < self.config.steps_of(self.arm)


def known(job: Job) -> Run | None:
    """Return what a run has found, None where it is not done."""
    record = job.folder / "run.json"
    if not record.is_file():
        return None
    try:
        found = Run.model_validate_json(record.read_bytes())
    except ValidationError as error:
        raise damaged(record, f"it holds no run ({error.errors()[0]['msg']})") from error
    # Another arm with the same settings may have made it.
    return found.model_copy(update={"arm": job.arm})


def evaluation_steps(steps: int, evaluations: int) -> int:
    """Return how many steps lie between two evaluations, so few that there are as many as asked for, or more."""
    return max(1, steps // evaluations)


def _schedule_in_small(given: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return arguments whose schedule is as much shorter as a trial is: it is the whole run in small."""

    def scaled(asked: Any) -> Any:
        # A share of the steps is one already.
        counts = isinstance(asked, int) or (isinstance(asked, float) and asked >= 1)
        return asked * job.steps // job.config.steps_of(job.arm) if counts else asked

    settings = given.get("lr_scheduler_kwargs") or {}
    found = {**given, "warmup_steps": scaled(given["warmup_steps"])}
    if settings:
        found["lr_scheduler_kwargs"] = {k: scaled(v) if k.endswith("_steps") else v for k, v in settings.items()}
    return found


def arguments_of(job: Job) -> Any:
    """Return the transformers.TrainingArguments of a job."""
    asked = job.config.training_of(job.arm)
    saved = {"save_strategy": "steps"} if "save_steps" in asked else {}
    given = with_defaults({**_DEFAULTS, **saved, **asked})
    # A trial is judged by where it ends, and measuring it on the way would cost more than the trial.
    every = job.steps if job.is_trial else evaluation_steps(job.steps, job.config.evaluations)
    begin = {"eval_on_start": False} if job.is_trial else {}
    if job.is_trial:
        given = _schedule_in_small(given, job)
    ours = {
        "max_steps": job.steps,
        **fixed_arguments(str(job.folder)), "eval_strategy": "steps", "eval_steps": every, "learning_rate": job.rate,
        "seed": job.seed, "data_seed": job.seed, "logging_steps": every, **begin,
    }  # fmt: skip
    return training_arguments({**given, **ours}, f"arm {job.arm}")


def in_small(job: Job) -> ArmConfig:
    """Return an arm as a job trains it: what counts steps is as much shorter in a trial as the run itself."""
    arm, whole = job.config.arms[job.arm], job.config.steps_of(job.arm)

    def scaled(steps: int) -> int:
        return steps * job.steps // whole

    distill, recipe = arm.distill, arm.recipe
    if distill is not None:
        fading = {"fade_steps": scaled(in_steps(distill.fade_steps, whole))}
        until = {} if distill.until_step is None else {"until_step": max(1, scaled(distill.steps_taught(whole)))}
        distill = distill.model_copy(update={**fading, **until})
    if (new := recipe.new_parameters) is not None:
        new = new.of_run(whole)
        warmups = {name: scaled(getattr(new, name)) for name in ("warmup_steps", "old_warmup_steps")}
        recipe = recipe.model_copy(update={"new_parameters": new.model_copy(update=warmups)})
    return arm.model_copy(update={"distill": distill, "recipe": recipe})


def takes_scores(config: CompareConfig, arm: str, target: SourceConfig) -> bool:
    """Whether what an arm starts from is chosen or fitted by what calibration found; all arms have this target."""
    if config.arms[arm].random:
        return False
    asked = config.resize_of(arm, 0)
    before = understand(open_checkpoint(asked.source).config).sizes
    cut = [axis for axis, size in before.items() if axis != "vocab" and target.sizes.get(axis, size) < size]
    return bool(cut) and reads_scores(asked.preset, asked.select, asked.readers, asked.layers, cut)


def prepare(job: Job) -> None:
    """Write the model that a job starts from, unless it is there or random."""
    from anysize.calibration.scores import Scores  # noqa: PLC0415

    resize = job.config.resize_of(job.arm, job.seed)
    if job.config.arms[job.arm].random or job.start.is_whole:
        return
    target = understand(read_json(job.place.target))
    scored = takes_scores(job.config, job.arm, target)
    # They serve all arms, so the comparison knows what they took.
    found = partial(Scores.load, job.place.scores(job.config, job.arm)) if scored else None
    _load_what_converts(target)
    clock = clock_of(device_of_run(job.config.training))
    job.start.write(resize, found, clock, quiet, "anysize compare")


def _load_what_converts(target: SourceConfig) -> None:
    """Import what the first conversion in a process would import while it is timed."""
    from anysize.io.models import model_class  # noqa: PLC0415

    for name in ("anysize.fit", "anysize.proof.parity", "anysize.training.loop"):
        import_module(name)
    model_class(target.model_class)


def conversion_s(job: Job) -> float:
    """Return the processor seconds that it took to make what a job starts from."""
    if job.config.arms[job.arm].random:
        return 0.0
    return job.start.seconds["conversion_s"]


def _start(job: Job) -> Start:
    import torch  # noqa: PLC0415

    if not job.config.arms[job.arm].random:
        return job.start.start(torch.float32)
    target, home = understand(read_json(job.place.target)), folder_of(open_checkpoint(job.config.source))
    # Other numbers than the seeds of the data's order.
    return at_random(target, home, 1000 + job.seed, torch.float32)


def carry_out(job: Job) -> Run:
    """Train one run and return what it found; one that is done is not trained again, a stopped one goes on."""
    before = known(job)
    if before is not None:
        return before
    from anysize.training.loop import make_teacher, run  # noqa: PLC0415 - it needs transformers' trainer

    arm, args = in_small(job), arguments_of(job)
    start = _start(job)
    data = datasets_of(job.config.data, start.config, start.tokenizer, examples_a_step(args), quiet)
    source = job.config.source
    teacher = None if arm.distill is None else make_teacher(arm.distill, source, data, start, args)
    outcome = run(start, data, args, teacher=teacher, recipe=arm.recipe, flip=job.config.data.flip, progress=quiet)
    at = tuple(step for step, found in sorted(outcome.curve.items()) if all(map(isfinite, found.values())))
    status = "diverged" if outcome.status == "diverged" else "trial" if job.is_trial else "finished"
    found = Run(
        arm=job.arm, seed=job.seed, learning_rate=job.rate, status=status, steps=job.steps, at=at,
        validation=tuple(outcome.curve[step]["validation"] for step in at),
        test=tuple(outcome.curve[step][job.config.split] for step in at), train_s=outcome.train_s,
        teacher_s=outcome.teacher_s, first_s=outcome.first_s,
        flops_per_s=outcome.flops_per_s,
    )  # fmt: skip
    write_json(job.folder / "run.json", found.model_dump(mode="json"))
    for path in job.folder.glob("checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    return found
