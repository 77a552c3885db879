"""`anysize train`: one training run from a YAML file, on one device or under torchrun and accelerate launch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o

Config = Annotated[Path, typer.Argument(help="A YAML file; docs/training.md lists its keys.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Set one key, such as --set training.learning_rate=1e-3.")
]


def train(
    config: Config,
    override: Overrides = None,
    plan_only: Annotated[
        bool, typer.Option("--plan-only", help="Show sizes, tokens a step and memory, and stop.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Train a checkpoint, a random start or a plan applied on the fly; the same command resumes a stopped run."""
    from anysize.cli.carry_out import command_line, keeping_work_on_interrupt  # noqa: PLC0415
    from anysize.cli.progress import progress_bars  # noqa: PLC0415
    from anysize.cli.show_training import show_foreseen, show_training  # noqa: PLC0415
    from anysize.training.config import train_config  # noqa: PLC0415
    from anysize.training.config_file import overridden, read_yaml  # noqa: PLC0415

    origin = str(config)
    asked = train_config(overridden(read_yaml(config), override or []), origin)
    from anysize.training.run import foreseen  # noqa: PLC0415
    from anysize.training.run import train as carry_out  # noqa: PLC0415

    if plan_only:
        show_foreseen(foreseen(asked, origin), as_json=json)
        return

    with keeping_work_on_interrupt(), progress_bars(enabled=not json) as progress:
        found = carry_out(asked, command=command_line(), origin=origin, progress=progress)
    if found:
        show_training(found, asked.output, as_json=json)
