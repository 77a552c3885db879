"""`anysize calibrate`: run a source on data and write what its activations say, for any target size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o


def calibrate(
    source: o.Source,
    data: Annotated[
        str,
        typer.Argument(
            help="A text file, a folder, parquet or jsonl, or a Hub data set; for an image model image files, parquet "
            "or a Hub data set with an image column."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The scores file to write.")] = Path(
        "scores.safetensors"
    ),
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="At most so many tokens, or images.", show_default="131072 tokens, 2048 images"),
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of one sequence; images have none.", show_default="256, or all positions"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences (or images) of one batch.")] = 8,
    column: Annotated[str, typer.Option(help="The column of the text or of the images, where there are several.")] = "",
    label_column: Annotated[
        str, typer.Option(help="The column of an image's label, which --leave-one-out reads.")
    ] = "label",
    second_moments: Annotated[
        bool, typer.Option(help="Collect what least-squares readers and principal directions need.")
    ] = True,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Also measure the loss without each layer.")
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory", help="Run layer by layer, with one layer and its sums in memory; the rest lies on disk."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    tokenizer: Annotated[str, typer.Option(help="Where the tokenizer lies, if not beside SOURCE.")] = "",
    json: o.Json = False,
) -> None:
    """Run SOURCE on DATA and write the scores of its axes and layers: one pass that serves every target size."""
    from anysize import api  # noqa: PLC0415
    from anysize.calibration.calibrate import scores_bytes  # noqa: PLC0415
    from anysize.cli.carry_out import keeping_work_on_interrupt  # noqa: PLC0415
    from anysize.cli.progress import progress_bars, size_of  # noqa: PLC0415
    from anysize.cli.show import say, show_scores  # noqa: PLC0415
    from anysize.config import understand  # noqa: PLC0415
    from anysize.processes import rank_and_world  # noqa: PLC0415

    config = understand(api.open_source(source).config)
    # Of the processes of a torchrun one speaks.
    speaks = rank_and_world()[0] == 0
    if speaks and not json:
        say(f"scores of about {size_of(scores_bytes(config, second_moments=second_moments))} go to {output}")
    with keeping_work_on_interrupt(), progress_bars(enabled=speaks and not json) as progress:
        scores = api.calibrate(
            source,
            data,
            output=output,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            column=column,
            label_column=label_column,
            second_moments=second_moments,
            leave_one_out=leave_one_out,
            low_memory=low_memory,
            device=device,
            tokenizer=tokenizer,
            progress=progress,
        )
    if speaks:
        show_scores(scores, output, as_json=json)
