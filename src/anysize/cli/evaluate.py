"""`anysize eval`: held-out loss, divergence from the source, and tasks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o


class Compute(StrEnum):
    """Types that a model may run in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def evaluate(
    model: o.Source,
    data: Annotated[
        str | None,
        typer.Option(
            help="Held-out data, read from their start: a text file, a folder, parquet or jsonl, or a Hub data set; "
            "parquet or a Hub data set with images and integer labels for an image model."
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Also measure KL(source || model) and top-1 agreement with this model.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens (images for an image model).")] = 131_072,
    sequence_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one window; 1024, or what the model has positions for.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows (or images) of one batch.")] = 8,
    column: Annotated[str, typer.Option(help="The text (or image) column, where there are several.")] = "",
    label_column: Annotated[str, typer.Option(help="The column of an image's label, when not `label`.")] = "",
    split: Annotated[str, typer.Option(help="The split of a Hub data set; files have none.")] = "validation",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[
        Compute, typer.Option(help="What the model runs in; auto is float32 on a processor, else as it is stored.")
    ] = Compute.auto,
    tokenizer: Annotated[str, typer.Option(help="Where the tokenizer lies, if not beside MODEL.")] = "",
    tasks: Annotated[
        str, typer.Option(help="Tasks of lm-eval: blimp, lambada_openai, arc_easy, piqa, openbookqa; comma-separated.")
    ] = "",
    task_data: Annotated[
        Path | None, typer.Option(help="The folder with the tasks' data, a parquet file named as each task.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many examples of each task (and of each part).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the result to this file, as JSON.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Measure MODEL: loss in nats/token and bits/byte, KL and agreement with its source, accuracy on tasks."""
    from anysize.cli.carry_out import ending_on_interrupt  # noqa: PLC0415
    from anysize.cli.progress import progress_bars  # noqa: PLC0415
    from anysize.cli.show_evaluation import show_evaluation  # noqa: PLC0415
    from anysize.evals import evaluate as evals  # noqa: PLC0415
    from anysize.evals.evaluation import check_output, save  # noqa: PLC0415

    if output is not None:
        check_output(output)
    with ending_on_interrupt(), progress_bars(enabled=not json) as progress:
        found = evals.evaluate(
            model,
            data,
            source=source,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            column=column,
            label_column=label_column,
            split=split,
            device=device,
            dtype=dtype.value,
            tokenizer=tokenizer,
            tasks=[name.strip() for name in tasks.split(",")] if tasks else (),
            task_data=task_data,
            limit=limit,
            progress=progress,
        )
    # Shown first: a disk that has filled up meanwhile costs the file, and not the figures.
    show_evaluation(found, as_json=json)
    if output is not None:
        save(found, output)
