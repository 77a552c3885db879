"""Tables of the families: one module per `model_type`, data only. `table` finds one; an unknown family is refused."""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path

from anysize.arch.schema import Architecture
from anysize.errors import ArchitectureError, did_you_mean

_NOT_TABLES = {"__init__", "schema", "expression"}


def families() -> tuple[str, ...]:
    """Return every `model_type` that has a table, sorted."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in _NOT_TABLES))


@cache
def table(model_type: str) -> Architecture:
    """Return the table of a family; raise ArchitectureError naming the nearest known family otherwise."""
    if model_type not in families():
        raise ArchitectureError(
            f"model_type '{model_type}' has no table{did_you_mean(model_type, families())}; "
            f"known: {', '.join(families())}; docs/add-an-architecture.md says how to add one"
        )
    return importlib.import_module(f"anysize.arch.{model_type}").ARCHITECTURE
