"""anysize makes a transformer of any size out of a pretrained one, and proves what it kept.

Public functions live here and load on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anysize.api import apply, calibrate, plan, resize, verify
    from anysize.evals.evaluate import evaluate
    from anysize.recipe import Plan

__version__ = "0.1.0"
__all__ = ["Plan", "__version__", "apply", "calibrate", "evaluate", "plan", "resize", "verify"]


def __getattr__(name: str) -> object:
    if name in ("apply", "calibrate", "plan", "resize", "verify"):
        from anysize import api  # noqa: PLC0415

        return getattr(api, name)
    if name == "evaluate":
        from anysize.evals.evaluate import evaluate  # noqa: PLC0415

        return evaluate
    if name == "Plan":
        from anysize.recipe import Plan  # noqa: PLC0415

        return Plan
    raise AttributeError(f"module 'anysize' has no attribute '{name}'")
