"""`anysize compare`: arms, seeds and learning rates over the same tokens, from a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o
from anysize.cli.train import Overrides

Config = Annotated[Path, typer.Argument(help="A YAML file; docs/training.md lists its keys.")]


def compare(config: Config, override: Overrides = None, json: o.Json = False) -> None:
    """Train every arm on the same tokens and tell what each needs to come as far as another; a stopped one goes on."""
    from anysize.cli.carry_out import command_line, keeping_work_on_interrupt  # noqa: PLC0415
    from anysize.cli.show import progress_bars, show_comparison  # noqa: PLC0415
    from anysize.comparison.config import compare_config  # noqa: PLC0415
    from anysize.training.config_file import overridden, read_yaml, spelled  # noqa: PLC0415

    raw = overridden(read_yaml(config), override or [])
    asked = compare_config(raw, str(config))
    from anysize.comparison.compare import compare as carry_out  # noqa: PLC0415

    with keeping_work_on_interrupt(), progress_bars(enabled=not json) as progress:
        results = carry_out(asked, text=spelled(raw), command=command_line(), progress=progress)
    show_comparison(results, Path(asked.output) / "results.json", as_json=json)
