"""What the suites take as a source: a model with a folder, data for what grows or shrinks out of it, and a price."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from anysize.config import understand
from anysize.flops import training_flops
from anysize.progress import Progress

# As `source_cost` of a comparison has it.
Cost = Mapping[str, float]


class Source(Protocol):
    """What a suite starts from."""

    def made(self, progress: Progress) -> tuple[Path, Cost]:
        """Return the folder of the trained model and what its training took; a finished one at once."""
        ...

    def write_data(self, folder: Path) -> None:
        """Write the train, validation and test.parquet of the arms into a folder, once."""
        ...

    def shorter(self, part: int) -> Source:
        """Return the same with so small a part of the steps."""
        ...


def cost_of(home: Path, seconds: float, examples: int, context: int) -> Cost:
    """Return what it took to train the model of a folder, in these seconds, on so many tokens or images."""
    config = understand(json.loads((home / "config.json").read_text(encoding="utf-8")))
    return {"train_s": seconds, "train_tokens": examples, "train_flops": examples * training_flops(config, context)}


def key_of(settings: Any) -> str:
    """Return what tells the settings of a source (a dataclass) from others."""
    return hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode()).hexdigest()[:16]
