"""The model card of a trained model: what it started from, how it was trained, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from anysize import __version__
from anysize.training.start import Start


def training_card(start: Start, found: Mapping[str, Any], command: str) -> str:
    """Return README.md of a trained model."""
    plan = start.plan
    base = Path(plan.source.location if plan else start.tokenizer).name
    head = {"base_model": base, "library_name": "transformers", "tags": ["anysize", *([plan.preset] if plan else [])]}
    origin = f"resized from {base} with the preset `{plan.preset}`" if plan else f"started from {base}"
    curve: Mapping[str, Mapping[str, float]] = found["curve"]
    splits = list(next(iter(curve.values()), {}))
    table = [
        "| step | " + " | ".join(splits) + " |",
        "| --- |" + " --- |" * len(splits),
        *("| " + " | ".join([step, *(f"{losses[split]:.4f}" for split in splits)]) + " |"
          for step, losses in curve.items()),
        "",
    ] if splits else []  # fmt: skip
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {base}, trained by anysize", "",
        f"A model {origin}, trained for {found['steps']:,} steps on {found['tokens']:,} tokens by anysize "
        f"{__version__}. Held-out figures (losses in nats, error rates as shares):", "",
        *table, "```", command, "```", "",
    ])  # fmt: skip
