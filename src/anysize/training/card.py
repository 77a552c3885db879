"""The model card of a trained model: what it started from, how it was trained, and what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from anysize import __version__
from anysize.training.config import TrainConfig
from anysize.training.start import Start


def _named(location: str) -> str:
    """Return a Hub id as it is, a folder by its name."""
    path = Path(location).expanduser()
    return path.resolve().name if path.exists() or path.is_absolute() else location


def training_card(config: TrainConfig, start: Start, found: Mapping[str, Any], command: str) -> str:
    """Return README.md of a trained model."""
    plan = start.plan
    base = _named(config.model or config.random or (config.resize.source if config.resize else ""))
    head: dict[str, Any] = {} if config.random else {"base_model": base}
    head |= {"library_name": "transformers", "tags": ["anysize", *([plan.preset] if plan else [])]}
    origin = f"resized from {base} with the preset `{plan.preset}`" if plan else f"started from {base}"
    if config.random:
        origin = f"started at random with the config of {base}"
    curve: Mapping[str, Mapping[str, float]] = found["curve"]
    splits = list(next(iter(curve.values()), {}))
    table = [
        "| step | " + " | ".join(splits) + " |",
        "| --- |" + " --- |" * len(splits),
        *("| " + " | ".join([step, *(f"{losses[split]:.4f}" for split in splits)]) + " |"
          for step, losses in curve.items()),
        "",
    ] if splits else []  # fmt: skip
    figures = " Held-out figures (losses in nats, error rates as shares):" if splits else ""
    return "\n".join([
        "---", yaml.safe_dump(head, sort_keys=False).strip(), "---", "",
        f"# {base}, trained by anysize", "",
        f"A model {origin}, trained for {found['steps']:,} steps on {found['tokens']:,} {found['unit']} by anysize "
        f"{__version__}.{figures}", "",
        *table, "```", command, "```", "",
    ])  # fmt: skip
