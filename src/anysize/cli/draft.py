"""`anysize draft`: cut a draft model out of a source, teach it, and measure what it is worth to that source."""

from __future__ import annotations

from typing import Annotated

import typer

from anysize.cli import options as o
from anysize.errors import InputError


def draft(
    source: o.Source,
    output: o.Output,
    data: Annotated[str, typer.Option(help="What to train on: text, parquet, jsonl, a folder or a Hub data set.")],
    held_out: Annotated[str, typer.Option(help="What to measure on.")],
    column: Annotated[str, typer.Option(help="The text column, where there are several.")] = "",
    hidden_size: o.HiddenSize = None,
    intermediate_size: o.IntermediateSize = None,
    num_hidden_layers: o.NumHiddenLayers = None,
    num_attention_heads: o.NumAttentionHeads = None,
    num_key_value_heads: o.NumKeyValueHeads = None,
    scale: o.Scale = None,
    num_params: o.NumParams = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 2000,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(min=0, help="The highest learning rate.")] = 2e-3,
    drafted: Annotated[int, typer.Option(min=1, help="Tokens that the draft proposes at a time.")] = 5,
    prompts: Annotated[int, typer.Option(min=1, help="Beginnings of held-out text to go on from.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after each.")] = 64,
    json: o.Json = False,
) -> None:
    """Make a draft model of SOURCE in OUTPUT: cut by what it keeps on DATA, taught by SOURCE, measured beside it."""
    from anysize.cli.carry_out import command_line, keeping_work_on_interrupt  # noqa: PLC0415
    from anysize.cli.progress import progress_bars  # noqa: PLC0415
    from anysize.cli.show_evaluation import show_drafting  # noqa: PLC0415
    from anysize.evals.drafting import save_drafting  # noqa: PLC0415
    from anysize.training.config import train_config  # noqa: PLC0415
    from anysize.training.draft import make_draft  # noqa: PLC0415

    if not held_out:
        raise InputError("--held-out is empty: name the text that the draft is measured on")
    sizes = {
        "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads, "scale": scale,
        "num_params": num_params,
    }  # fmt: skip
    resize = {"source": source, **sizes, "preset": "subspace", "layers": "uniform" if num_hidden_layers else "auto",
              "calibration": {}}  # fmt: skip
    read = {"train": data, "validation": held_out, "column": column, "sequence_length": sequence_length}
    training = {"max_steps": steps, "per_device_train_batch_size": batch_size, "learning_rate": learning_rate,
                "eval_steps": max(1, steps // 4)}  # fmt: skip
    asked = train_config(
        {"output": str(output), "resize": resize, "data": read, "distill": {"weight": 1.0}, "training": training},
        "anysize draft",
    )
    with keeping_work_on_interrupt(), progress_bars(enabled=not json) as progress:
        made = make_draft(
            asked, num_prompts=prompts, new_tokens=new_tokens, num_drafted=drafted, command=command_line(),
            progress=progress,
        )  # fmt: skip
    # Another process than the first: nobody but that one speaks.
    if made is None:
        return
    trained, found = made
    show_drafting(trained, found, output, num_prompts=prompts, as_json=json)
    save_drafting(found, source, output)
