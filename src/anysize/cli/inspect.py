"""`anysize inspect`: what a checkpoint is, axis by axis, and how it can be resized."""

from __future__ import annotations

from anysize.cli import options as o


def inspect(model: o.Source, json: o.Json = False) -> None:
    """Show the sizes, axes and tensors of MODEL, and what made it if anysize did."""
    from anysize.cli.show import show_inspection  # noqa: PLC0415
    from anysize.inspection import inspect_model  # noqa: PLC0415

    show_inspection(inspect_model(model), as_json=json)
