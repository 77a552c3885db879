"""`anysize apply`: carry out a saved plan; the same plan and source give the same bytes anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o


def apply(
    plan: Annotated[Path, typer.Argument(help="A plan saved by `anysize plan -o`.")],
    output: o.Output,
    source: Annotated[str | None, typer.Option(help="Where the source is now, if it moved since planning.")] = None,
    verify: o.VerifyName = o.Verify.auto,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    json: o.Json = False,
) -> None:
    """Carry out the plan PLAN into the folder OUTPUT."""
    from anysize.cli.carry_out import carry_out  # noqa: PLC0415
    from anysize.recipe import Plan  # noqa: PLC0415

    carry_out(
        Plan.load(plan),
        output,
        source=source,
        verify=verify,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        as_json=json,
    )
