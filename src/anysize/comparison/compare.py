"""Compare: prepare what arms start from, search rates, run the seeds, and write what was found after every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from anysize.calibration.data import DataOptions
from anysize.comparison.config import CompareConfig
from anysize.comparison.flops import conversion_flops, leave_one_out_flops
from anysize.comparison.folder import RECORD, claimed
from anysize.comparison.job import Job, arguments_of, carry_out, conversion_s, known, prepare, takes_scores
from anysize.comparison.legal import models_of_arms, require_plannable, require_trainable, target_of
from anysize.comparison.records import machine, plan_record, resize_command, versions
from anysize.comparison.search import ladder, search
from anysize.comparison.summary import rows_of
from anysize.comparison.workers import each, processes
from anysize.config import understand
from anysize.errors import AnysizeError, InputError
from anysize.flops import forward_flops, training_flops
from anysize.io.hub import open_checkpoint
from anysize.io.image_processor import identity_of
from anysize.io.lock import FolderLock
from anysize.io.whole import read_json, told_of_disk, write_json
from anysize.processes import rank_and_world
from anysize.progress import Progress
from anysize.report.schema import Arm, Metric, Results, Row, Run, SourceRecord
from anysize.target import public_sizes
from anysize.tensors import num_parameters
from anysize.training.arguments import with_defaults
from anysize.training.clock import clock_of, device_of_run, peak_of, seconds_of
from anysize.training.data import Datasets, datasets_of, shared_files
from anysize.training.start import beside_weights, calibration_of, folder_of, scores_from

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from anysize.comparison.measure import Figure
    from anysize.io.reader import TensorSource
    from anysize.recipe import Plan


# Nats/token by which end tokens between documents may raise a source's loss before that is told.
_NOTED = 0.01


class Comparison:
    """One comparison at work: its folder, its processes, and what has been found so far."""

    def __init__(self, config: CompareConfig, text: str, command: str, progress: Progress) -> None:
        self.config, self.text, self.command, self.progress = config, text, command, progress
        self._arms: dict[str, Arm] = {}
        self._chosen: dict[str, float] = {}
        if (world := rank_and_world()[1]) > 1:
            raise InputError(f"{world} processes were started, and a comparison starts its own: start it once")
        self.device = device_of_run(config.training)
        self.clock = clock_of(self.device)
        self.tensors = open_checkpoint(config.source)
        self.source = understand(self.tensors.config)
        others = models_of_arms(config, self.tensors)
        self.target = target_of(config, self.source)
        require_trainable(config)
        require_plannable(config, self.target)
        self.data = self._data()
        self.lock = FolderLock.of_runs(Path(config.output).expanduser(), RECORD, "comparison")
        try:
            self.place = claimed(
                config,
                _identity_of(self.tensors) + identity_of(folder_of(self.tensors), self.source),
                {name: _identity_of(other) for name, other in others.items()},
                public_sizes(self.target),
                " on ".join(filter(None, [seconds_of(self.device), peak_of(self.device)[0]])),
            )
        except AnysizeError:
            self.lock.release()
            raise
        write_json(self.place.target, {**self.target.raw, "architectures": [self.target.model_class]})
        try:
            self.calibration_s = {arm: self._calibrate(arm) for arm in config.arms
                                  if takes_scores(config, arm, self.target)}  # fmt: skip
        except AnysizeError:
            self.place.withdraw()
            self.lock.release()
            raise

    def _data(self) -> Datasets:
        return datasets_of(self.config.data, self.target, folder_of(self.tensors), self._examples_a_step, self.progress)

    @property
    def _examples_a_step(self) -> int:
        """How many sequences, or images, one step of every arm sees."""
        given = with_defaults(self.config.training)
        return given["per_device_train_batch_size"] * given.get("gradient_accumulation_steps", 1)

    def _calibrated_tokens(self, arm: str) -> int:
        """Return how many tokens the source of an arm was calibrated on."""
        from anysize.calibration.scores import Scores  # noqa: PLC0415

        return Scores.load(self.place.scores(self.config, arm), low_memory=True).record.tokens

    def _calibrate(self, arm: str) -> float:
        """Calibrate the source of an arm unless it is done; return the seconds that it took."""
        place = self.place.scores(self.config, arm)
        record = place.with_suffix(".json")
        if not record.is_file():
            begin = self.clock()
            calibrate = scores_from(
                self.config.resize_of(arm, 0).source, self.config.calibration, self.config.data, self.progress,
                leave_one_out=self.config.leaves_one_out(arm),
            )  # fmt: skip
            assert calibrate is not None
            scores = calibrate()
            seconds = self.clock() - begin
            with told_of_disk(f"cannot keep the scores of '{arm}' in '{place.parent}'"):
                place.parent.mkdir(parents=True, exist_ok=True)
            scores.save(place)
            write_json(record, {"calibration_s": seconds})
        return read_json(record, "calibration_s")["calibration_s"]

    def job(self, arm: str, rate: float, seed: int, steps: int | None = None) -> Job:
        """Return one run of an arm; of all its steps where none are given."""
        return Job(self.place, self.config, arm, rate, seed, self.config.steps_of(arm) if steps is None else steps)

    def run(self) -> Results:
        """Carry out everything that is missing and return the results, which are also in results.json."""
        config = self.config
        # Before any run is timed on the same device.
        _ = self._sources
        with processes(config.workers) as pool:
            starts = {self.job(arm, 0.0, seed).start: self.job(arm, 0.0, seed)
                      for arm in config.arms for seed in config.seeds if not config.arms[arm].random}  # fmt: skip
            each(pool, prepare, [*starts.values()], lambda number: self.progress("starts", number, len(starts)))

            def train(asked: list[tuple[str, float, int]]) -> list[Run]:
                return self._carry_out(pool, [self.job(arm, r, config.seeds[0], steps) for arm, r, steps in asked])

            rates = {arm: config.rates_of(arm) for arm in config.arms}
            steps = {arm: config.steps_of(arm) for arm in config.arms}
            # Older runs in the folder, of rates that are not tried now or of another search, have no say.
            best = self._chosen = search(rates, steps, halving=config.halving, train=train)
            others = [self.job(arm, best[arm], seed) for seed in config.seeds[1:] for arm in config.arms]
            self._carry_out(pool, others)
        return self.write(complete=True)

    def _carry_out(self, pool: Executor, jobs: Sequence[Job]) -> list[Run]:
        """Return the runs of jobs in order; each is in the results as soon as it is there."""
        # Arms that differ in nothing but their names share a run.
        missing = {job.folder: job for job in jobs if known(job) is None}

        def then(_: int) -> None:
            self.write(complete=False)
            self.progress("runs", len(self.runs()), self.num_runs)

        each(pool, carry_out, [*missing.values()], then)
        found = [known(job) for job in jobs]
        return [run for run in found if run is not None]

    @property
    def num_runs(self) -> int:
        """How many runs there are in the end, trials included."""
        return sum(len(self._trials(arm)) + len(self.config.seeds) for arm in self.config.arms)

    def _trials(self, arm: str) -> list[tuple[float, int]]:
        """Return (rate, steps) of as many trials as an arm has; which rates the later ones have is not known before."""
        rates, steps = self.config.rates_of(arm), self.config.steps_of(arm)
        if not self.config.halving:
            return [(rate, steps) for rate in rates[1:]]
        left, found = len(rates), list[tuple[float, int]]()
        for trial, kept in ladder(len(rates), steps):
            found += [(rate, trial) for rate in rates[:left]]
            left = kept
        return found

    def runs(self) -> list[Run]:
        """Return all runs there are, arm by arm: those of all steps, and then the trials."""
        found: list[Run | None] = []
        for arm in self.config.arms:
            rates, whole = self.config.rates_of(arm), self.config.steps_of(arm)
            found += [known(self.job(arm, rate, seed)) for seed in self.config.seeds for rate in rates]
            trials = {steps for _, steps in self._trials(arm) if steps < whole}
            first = self.config.seeds[0]
            found += [known(self.job(arm, rate, first, steps)) for steps in sorted(trials) for rate in rates]
        return [run for run in found if run is not None]

    def write(self, *, complete: bool) -> Results:
        """Write and return what there is so far."""
        results = self.results(complete=complete)
        results.save(self.place.path / "results.json")
        return results

    def results(self, *, complete: bool) -> Results:
        """Return what there is so far."""
        config, runs = self.config, self.runs()
        arms = {name: self._arm(name) for name in config.arms}
        args = config.training
        tokens_a_step = self._examples_a_step * self.data.tokens_each
        image = self.source.architecture.modality == "image"
        metric = Metric(name="error rate", unit="share of images") if image else Metric(
            name="loss", unit="nats/token", bits_per_byte=self.data.bits_per_byte[config.split])  # fmt: skip
        rows = rows_of(runs, arms, config.goals, tokens_a_step, self._chosen)
        return Results(
            title=config.title or f"{Path(config.source).name}: {', '.join(config.arms)}", complete=complete,
            modality="image" if image else "text", metric=metric,
            date=datetime.now(UTC).date().isoformat(), machine=machine(self.device),
            versions=versions(), command=self.command,
            config=self.text, source=self._source_record(), steps=int(args["max_steps"]), tokens_a_step=tokens_a_step,
            learning_rates=config.learning_rates, seeds=config.seeds, goals=config.goals,
            notes=tuple(self._notes(runs, rows)), arms=tuple(arms.values()), runs=tuple(runs), rows=rows,
        )  # fmt: skip

    @cached_property
    def _sources(self) -> dict[str, tuple[int, Figure]]:
        """Parameters and figure of the source, and of those that some arms have for themselves, by their names."""
        from anysize.comparison.measure import Figure, held_out  # noqa: PLC0415

        place = self.place.path / "sources.json"
        known: dict[str, Any] = read_json(place) if place.is_file() else {}
        found: dict[str, tuple[int, Figure]] = {}
        args = arguments_of(self.job(next(iter(self.config.arms)), self.config.learning_rates[0], self.config.seeds[0]))
        for source in dict.fromkeys([self.config.source, *(arm.source for arm in self.config.arms.values())]):
            if source:
                tensors = open_checkpoint(source)
                identity = _identity_of(tensors)
                try:
                    figure = Figure.model_validate(known.get(identity))
                except ValidationError:
                    figure = held_out(folder_of(tensors), self.data, self.config.split, args)
                    known[identity] = figure.model_dump()
                    write_json(place, known)
                found[source] = num_parameters(understand(tensors.config)), figure
        return found

    @cached_property
    def _shared_files(self) -> list[str]:
        return shared_files(self.config.data, images=self.source.architecture.modality == "image")

    def _source_record(self) -> SourceRecord:
        count, figure = self._sources[self.config.source]
        return SourceRecord(
            location=self.config.source, num_parameters=count, sizes=public_sizes(self.source), test=figure.value,
            **self.config.source_cost.model_dump(),
        )  # fmt: skip

    def _arm(self, name: str) -> Arm:
        """Return what an arm is; its plan and costs are there once its start is, and read once."""
        if name not in self._arms:
            found = self._described(name)
            if not found.plan and not self.config.arms[name].random:
                return found
            self._arms[name] = found
        return self._arms[name]

    def _described(self, name: str) -> Arm:
        arm, job = self.config.arms[name], self.job(name, 0.0, self.config.seeds[0])
        resize, length = self.config.resize_of(name, self.config.seeds[0]), self.data.tokens_each
        made = not arm.random and job.start.is_whole
        plan = job.start.plan if made else None
        target = self.target if plan is None else understand(plan.target_config)
        used = plan is not None and bool(plan.scores_sha256)
        teacher = 0.0
        if arm.distill is not None:
            understood = understand(open_checkpoint(arm.distill.teacher or self.config.source).config)
            # A sequence that the teacher writes goes through it once more.
            passes = bool(arm.distill.weight or arm.distill.hidden_weight) + bool(arm.distill.self_data)
            teacher = passes * forward_flops(understood, length)
        settings = arm.model_dump(mode="json", exclude_unset=True, exclude={"source_cost"})
        cost = self.config.source_cost_of(name)
        start = "a random initialization" if arm.random else f"{resize.preset} from {Path(resize.source).name}"
        command = "" if arm.random else resize_command(resize, self._calibration_command(name) if used else ())
        return Arm(
            name=name, start=start, command=command, num_parameters=num_parameters(target), sizes=public_sizes(target),
            settings=settings, calibration_s=self.calibration_s.get(name, 0.0) if used else 0.0,
            conversion_s=conversion_s(job) if made else 0.0, flops_a_token=training_flops(target, length),
            teacher_flops_a_token=teacher,
            teacher_steps=arm.distill.steps_taught(self.config.steps_of(name)) if arm.distill else None,
            calibration_flops=self._calibration_flops(name) if used else 0.0,
            conversion_flops=self._conversion_flops(name, plan) if plan and used else 0.0,
            source_train_s=cost.train_s, source_train_flops=cost.train_flops,
            plan=plan_record(plan) if plan else None,
        )  # fmt: skip

    def _calibration_command(self, arm: str) -> tuple[str, ...]:
        source = self.config.resize_of(arm, 0).source
        asked = calibration_of(self.config.calibration, understand(open_checkpoint(source).config))
        found = ["anysize", "calibrate", source, asked.data or self.config.data.train, "-o", "scores.safetensors"]
        found += ["--tokens", str(asked.tokens), "--sequence-length", str(asked.sequence_length)]
        found += ["--batch-size", str(asked.batch_size)]
        column = asked.column or self.config.data.column
        found += ["--column", column] if column else []
        found += ["--tokenizer", self.config.data.tokenizer] if self.config.data.tokenizer else []
        if not self.config.leaves_one_out(arm):
            return tuple(found)
        labels = self.config.data.label_column
        named = self.source.architecture.modality == "image" and labels != DataOptions().label_column
        return (*found, "--leave-one-out", *(["--label-column", labels] if named else []))

    def _calibration_flops(self, arm: str) -> float:
        understood = understand(open_checkpoint(self.config.resize_of(arm, 0).source).config)
        tokens = self._calibrated_tokens(arm)
        length = calibration_of(self.config.calibration, understood).sequence_length
        found = tokens * forward_flops(understood, length)
        if self.config.leaves_one_out(arm):
            found += leave_one_out_flops(understood, tokens, length)
        return found

    def _conversion_flops(self, arm: str, plan: Plan) -> float:
        tokens = self._calibrated_tokens(arm)
        source, target = understand(plan.source_config), understand(plan.target_config)
        length = calibration_of(self.config.calibration, source).sequence_length
        return conversion_flops(source, target, plan.options, tokens, length)

    def _notes(self, runs: Sequence[Run], rows: Sequence[Row]) -> Iterator[str]:
        if self.config.split == "validation":
            yield "there are no test data: figures are of the validation data that rates were chosen on"
        yield from self._shared_files
        arms, count = self.config.arms, num_parameters(self.target)
        goals = [row for row in rows
                 if row.arm in self.config.goals and arms[row.arm].random and not arms[row.arm].distill]  # fmt: skip
        for source, (before, figure) in self._sources.items():
            loss = min(figure.value, figure.of_text)
            if loss < figure.value - _NOTED:
                yield (
                    f"'{source}' does not expect the end tokens that stand between documents: over everything its loss "
                    f"is {figure.value:.3f}, without them and the token after each {loss:.3f}, which counts where "
                    "growing is judged"
                )
            for row in goals:
                if count > before and row.after > loss - 0.1:
                    yield (
                        f"against '{row.arm}' this comparison shows nothing about growing '{source}': it ends at "
                        f"{row.after:.3f}, and the source itself is at {loss:.3f}; train longer, or grow a younger "
                        "source"
                    )
        for row in rows:
            tried = self.config.rates_of(row.arm)
            if len(tried) > 1 and row.learning_rate in (tried[0], tried[-1]):
                end = "smallest" if row.learning_rate == tried[0] else "largest"
                yield f"the best rate of '{row.arm}' is the {end} that was tried: its best may lie beyond"
        for arm in dict.fromkeys(run.arm for run in runs if run.status == "diverged"):
            lost = [run for run in runs if run.arm == arm and run.status == "diverged"]
            rates = ", ".join(f"{rate:g}" for rate in sorted({run.learning_rate for run in lost}))
            yield f"{len(lost)} run{'s' * (len(lost) > 1)} of '{arm}' diverged (at {rates}): losses were not finite"


def _identity_of(tensors: TensorSource) -> str:
    """Return what tells a model from what may lie in its place another time, config and tokenizer included."""
    return f"{tensors.identity} {beside_weights(folder_of(tensors))}"


def compare(config: CompareConfig, *, text: str, command: str, progress: Progress) -> Results:
    """Carry out a comparison, or what is missing of it, and return its results, which are also in its folder.

    Raises InputError or OutputError before any training for everything that can be known by then.
    """
    comparison = Comparison(config, text, command, progress)
    with comparison.lock:
        return comparison.run()
