"""`anysize verify`: compare two models as their users would run them."""

from __future__ import annotations

from typing import Annotated

import typer

from anysize.cli import options as o


def verify(
    source: o.Source,
    target: Annotated[str, typer.Argument(help="The model to hold against it.")],
    json: o.Json = False,
) -> None:
    """Compare TARGET with SOURCE: logits, KL, padding, KV cache, greedy text, reload. Exit 1 where they differ."""
    from anysize import api  # noqa: PLC0415
    from anysize.cli.progress import progress_bars  # noqa: PLC0415
    from anysize.cli.show import json_of, show_proof  # noqa: PLC0415

    with progress_bars(enabled=not json) as progress:
        progress("verify", 0, 1)
        proof = api.verify(source, target)
        progress("verify", 1, 1)
    if json:
        typer.echo(json_of(proof))
    else:
        show_proof(proof)
    if not proof.passed:
        raise typer.Exit(1)
