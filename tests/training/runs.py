"""Small training runs for tests: their configs, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml


def config_of(llama: Path, story: Path, output: Path, **changes: Any) -> dict[str, Any]:
    training = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-3, "eval_steps": 4,
                "eval_on_start": True, "logging_steps": 1, "save_steps": 4}  # fmt: skip
    asked = changes.pop("training", {})
    if asked.get("eval_strategy") == "no":
        del training["eval_steps"], training["eval_on_start"]
    training |= asked
    data = {"train": str(story), "validation": str(story), "sequence_length": 32, "evaluation_tokens": 1024}
    return {"output": str(output), "model": str(llama), "data": data, "training": training, **changes}


def written(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "anysize-train.json").read_text())
