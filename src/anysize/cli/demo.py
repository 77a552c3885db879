"""`anysize demo`: pretrain a small model on text that every Python carries, grow it, and prove it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the models go.")] = Path("demo-output"),
    seconds: Annotated[float, typer.Option(min=1, help="How long to pretrain.")] = 60.0,
) -> None:
    """Pretrain a small model for about a minute, grow it, print plan, proof, both texts and held-out losses."""
    typer.echo("0. load torch and transformers")
    from anysize.demo import run_demo  # noqa: PLC0415

    run_demo(output, seconds)
