"""`anysize demo`: the whole story on text that every Python carries, in some minutes."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the models go.")] = Path("demo-output"),
    seconds: Annotated[float, typer.Option(min=1, help="How long to pretrain.")] = 60.0,
    json: o.Json = False,
) -> None:
    """Pretrain a small model, shrink it, grow a young one, train both against random starts and write the reports."""
    # With --json, standard output is for the one object; what a person would read goes to standard error.
    with redirect_stdout(sys.stderr) if json else nullcontext():
        typer.echo("0. load torch and transformers")
        from anysize.demo.story import run_demo  # noqa: PLC0415
        from anysize.io.whole import told_of_disk  # noqa: PLC0415

        with told_of_disk(f"the demo cannot be written to '{output}'", "make room, or choose another --output"):
            found = run_demo(output, seconds)
    if json:
        typer.echo(dumps(found))
