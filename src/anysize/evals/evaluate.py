"""Evaluate a model on held-out data, beside its source, and on tasks; see `anysize.evaluate`."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import log
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anysize.errors import InputError, joined
from anysize.evals.evaluation import (
    Evaluation,
    ImageFigures,
    ImageSource,
    TaskScore,
    TextFigures,
    TextSource,
)
from anysize.evals.measure import Sums
from anysize.evals.subject import Subject, evaluating, opened, require_comparable
from anysize.evals.windows import Speller, TextReader, tensors_of
from anysize.io.image_processor import ImageProcessor, image_processor_of, is_place, require_same_images
from anysize.io.models import tokenizer_of
from anysize.io.pictures import class_of, picture
from anysize.io.rows import rows
from anysize.progress import Progress, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The logits of one forward pass take at most so many numbers: batches are split where a vocabulary is large.
_LARGEST = 1 << 28
_LONGEST = 1024


@dataclass(frozen=True)
class Held:
    """Which held-out data are read and how: see `evaluate`."""

    data: str = ""
    tokens: int = 131_072
    sequence_length: int | None = None
    batch_size: int = 8
    column: str = ""
    label_column: str = ""
    split: str = "validation"
    tokenizer: str = ""


# What says nothing where only tasks are run.
_OF_DATA = ("tokens", "column", "label_column", "split")


def evaluate(
    model: str | Path | PreTrainedModel,
    data: str | Path | None = None,
    *,
    source: str | Path | PreTrainedModel | None = None,
    tokens: int = 131_072,
    sequence_length: int | None = None,
    batch_size: int = 8,
    column: str = "",
    label_column: str = "",
    split: str = "validation",
    device: str = "auto",
    dtype: str = "auto",
    tokenizer: str = "",
    tasks: Iterable[str] = (),
    task_data: str | Path | None = None,
    limit: int | None = None,
    progress: Progress = quiet,
) -> Evaluation:
    """Measure a model on held-out data, on lm-eval's tasks, or on both; a folder, a Hub id or a loaded model.

    `data` is a text file, a folder, parquet or jsonl with a text column (`column` where there are several) or a `split`
    of a Hub data set, read in its order: the first `tokens` tokens (for an image model so many images from all parts of
    the data, with integer labels in `label_column`). Windows are `sequence_length` tokens long, by default 1,024 or
    what the model has positions for; `docs/evaluation.md` says how they are made. `source` adds its own loss,
    KL(source || model) and top-1 agreement.
    `tasks` are run by lm-eval on the parquet files in `task_data`, the first `limit` examples of each.
    Called as progress(stage, done, total); stages are "evaluate" (tokens or images) and "tasks" (requests).
    Raises InputError for what cannot be used or compared, and as `anysize.plan` does for a checkpoint.
    """
    begun = time.monotonic()
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    held = Held(str(data or ""), tokens, sequence_length, batch_size, column, label_column, split, tokenizer)
    _check_options(data, source, names, task_data, limit, held)
    _check_counts(held, limit)
    if names:
        from anysize.evals.harness import check_tasks  # noqa: PLC0415

        check_tasks(names, str(task_data))
    subject = opened(model, "model", device=device, dtype=dtype)
    loaded = _loaded(subject, names, str(task_data)) if names else None
    other = None if source is None else opened(source, "source", device=device, dtype=dtype)
    if other is not None:
        require_comparable(subject, other)
    text = images = None
    with evaluating(subject, other):
        if data is not None and subject.is_image_model:
            images = _on_images(subject, other, held, progress)
        elif data is not None:
            text = _on_text(subject, other, held, progress)
        scores = _on_tasks(subject, names, loaded, held, limit, progress) if names else ()
    return Evaluation(
        model=subject.name,
        model_type=subject.config.architecture.model_type,
        num_parameters=sum(p.numel() for p in subject.model.parameters()),
        dtype=str(subject.model.dtype).removeprefix("torch."),
        device=str(subject.model.device),
        data=None if data is None else held.data,
        text=text,
        images=images,
        tasks=scores,
        versions={name: version(name) for name in ("anysize", "torch", "transformers", *(["lm_eval"] if names else []))}
        | {"python": platform.python_version()},
        wall_s=time.monotonic() - begun,
    )


def _check_options(
    data: object, source: object, names: Sequence[str], task_data: object, limit: object, held: Held
) -> None:
    """Refuse options that would do nothing, and tasks or data that lack what they need."""
    problems: list[str] = []
    if data is None and not names:
        problems.append("nothing to measure: give data, tasks or both")
    if data is None and source is not None:
        problems.append("a source is compared on data: give data as well")
    if names and task_data is None:
        problems.append("tasks need the folder with their parquet files: give task_data")
    if not names and (task_data is not None or limit is not None):
        problems.append("task_data and limit do nothing without tasks")
    if data is None and (idle := [n for n in _OF_DATA if getattr(held, n) != getattr(Held(), n)]):
        problems.append(f"{', '.join(idle)}: of data, and there are none; limit says how much of the tasks is run")
    if not held.split:
        problems.append("split='': wanted the name of a split, such as validation or test")
    if problems:
        raise InputError(joined(problems))


def _check_counts(held: Held, limit: int | None) -> None:
    counts = {"tokens": held.tokens, "sequence_length": held.sequence_length, "batch_size": held.batch_size}
    if wrong := [f"{k}={v}" for k, v in (counts | {"limit": limit}).items() if v is not None and v < 1]:
        raise InputError(f"{joined(wrong)}: wanted at least 1")


def _length(subject: Subject, other: Subject | None, wanted: int | None) -> int:
    """Return how many tokens a window has; raise InputError where a model has no positions for so many."""
    for each in (subject, other):
        if each is not None and wanted is not None and each.longest is not None and wanted > each.longest:
            raise InputError(f"sequence_length={wanted}: '{each.name}' has positions for {each.longest} tokens")
    lengths = [each.longest for each in (subject, other) if each is not None and each.longest is not None]
    return wanted or min([_LONGEST, *lengths])


def _on_text(subject: Subject, other: Subject | None, held: Held, progress: Progress) -> TextFigures:
    if held.label_column:
        raise InputError(f"label_column='{held.label_column}': '{subject.name}' reads text, which has no labels")
    both = [subject] if other is None else [subject, other]
    vocab_size = min(each.vocab_size for each in both)
    homes = dict.fromkeys(held.tokenizer or each.home for each in both)
    spellers = [Speller(tokenizer_of(home), vocab_size) for home in homes]
    length = _length(subject, other, held.sequence_length)
    reader = TextReader(
        held.data, spellers, column=held.column, split=held.split, tokens=held.tokens, length=length,
        vocab_size=vocab_size,
    )  # fmt: skip
    per_pass = max(1, min(held.batch_size, _LARGEST // (length * max(each.vocab_size for each in both))))
    sums = Sums()
    progress("evaluate", 0, held.tokens)
    for batch in reader.batches(per_pass):
        inputs = tensors_of(batch)
        logits = subject.logits(inputs)
        source = None if other is None else other.logits(inputs)
        for row, window in enumerate(batch):
            predicted = slice(len(window.inputs) - len(window.targets), len(window.inputs))
            targets = torch.tensor(window.targets)
            sums.add(logits[row, predicted], targets, None if source is None else source[row, predicted])
        progress("evaluate", sums.rows, held.tokens)
    amount = reader.amount
    assert sums.rows == amount.num_tokens, "a token was predicted twice, or not at all"
    if not amount.num_bytes:
        raise InputError(f"the data '{held.data}' are {sums.rows} tokens that spell no whole character: read more")
    bits = 1 / (log(2) * amount.num_bytes)
    return TextFigures(
        num_documents=amount.num_documents,
        num_tokens=sums.rows,
        num_bytes=amount.num_bytes,
        num_unknown_tokens=amount.num_unknown_tokens,
        sequence_length=length,
        loss_nats_per_token=sums.nats / sums.rows,
        bits_per_byte=sums.nats * bits,
        top1_accuracy=sums.right / sums.rows,
        source=None if other is None else TextSource(
            source=other.name,
            loss_nats_per_token=sums.source_nats / sums.rows,
            bits_per_byte=sums.source_nats * bits,
            top1_accuracy=sums.source_right / sums.rows,
            kl_nats_per_token=sums.kl / sums.rows,
            top1_agreement=sums.agree / sums.rows,
        ),
    )  # fmt: skip


def _processor(subject: Subject, other: Subject | None) -> ImageProcessor:
    """Return how images are prepared for both; raise InputError where they want them in different ways.

    A model in memory that came from nowhere (a resized one) takes them as the other does.
    """
    placed = [each for each in (subject, other) if each is not None and is_place(each.home, each.config)] or [subject]
    found = [image_processor_of(each.home, each.config) for each in placed]
    require_same_images(found[0], found[-1], f"'{placed[0].name}' and '{placed[-1].name}'")
    return found[0]


def _labelled(subject: Subject, other: Subject | None, held: Held) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield (pixels, label), `tokens` of the data: of all parts of them, because images often lie by class."""
    column, classes = held.label_column or "label", subject.config.sizes["label"]
    processor = _processor(subject, other)
    for row in itertools.islice(rows(held.data, split=held.split, images=True), held.tokens):
        label = class_of(row, held.data, column, "--label-column", num_classes=classes, model=subject.name)
        yield processor.pixels(processor.stored(picture(row, held.data, held.column), held.data)), label


def _on_images(subject: Subject, other: Subject | None, held: Held, progress: Progress) -> ImageFigures:
    if held.sequence_length is not None:
        raise InputError(f"sequence_length={held.sequence_length}: '{subject.name}' reads images")
    if held.tokenizer:
        raise InputError(f"tokenizer='{held.tokenizer}': '{subject.name}' reads images")
    sums = Sums()
    waiting: list[tuple[torch.Tensor, int]] = []

    def measure() -> None:
        inputs = {"pixel_values": torch.stack([image for image, _ in waiting])}
        targets = torch.tensor([label for _, label in waiting])
        sums.add(subject.logits(inputs), targets, None if other is None else other.logits(inputs))
        waiting.clear()
        progress("evaluate", sums.rows, held.tokens)

    progress("evaluate", 0, held.tokens)
    for pair in _labelled(subject, other, held):
        waiting.append(pair)
        if len(waiting) == held.batch_size:
            measure()
    if waiting:
        measure()
    if not sums.rows:
        raise InputError(f"the data '{held.data}' are empty")
    return ImageFigures(
        num_images=sums.rows,
        loss_nats_per_image=sums.nats / sums.rows,
        top1_accuracy=sums.right / sums.rows,
        source=None if other is None else ImageSource(
            source=other.name,
            loss_nats_per_image=sums.source_nats / sums.rows,
            top1_accuracy=sums.source_right / sums.rows,
            kl_nats_per_image=sums.kl / sums.rows,
            top1_agreement=sums.agree / sums.rows,
        ),
    )  # fmt: skip


def _loaded(subject: Subject, names: Sequence[str], task_data: str) -> Any:
    """Return the tasks with their data, or refuse them, before anything is measured, which may take hours."""
    from anysize.evals.harness import load_tasks  # noqa: PLC0415

    if subject.is_image_model:
        raise InputError(f"the tasks {joined(names)} are text, and '{subject.name}' reads images")
    return load_tasks(names, task_data)


def _on_tasks(
    subject: Subject, names: Sequence[str], loaded: Any, held: Held, limit: int | None, progress: Progress
) -> tuple[TaskScore, ...]:
    from anysize.evals.harness import run_tasks  # noqa: PLC0415

    length = _length(subject, None, held.sequence_length)
    tokenizer = tokenizer_of(held.tokenizer or subject.home)
    return run_tasks(
        subject, tokenizer, names, loaded, length=length, batch_size=held.batch_size, limit=limit, progress=progress
    )
