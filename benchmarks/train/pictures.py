"""The source of the vision suite: a small ViT, trained on CIFAR-10 by `anysize train`, cached under its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from anysize.io.whole import write_json
from anysize.progress import Progress
from anysize.training.config import train_config
from anysize.training.run import train
from benchmarks.measure import CACHE, DATA
from benchmarks.train.sources import Cost, cost_of, key_of

IMAGES = DATA / "cifar10"
_NUM_HELD_OUT = 5_000


@dataclass(frozen=True)
class Settings:
    """What the source is made of."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    patch_size: int = 4
    batch: int = 64
    steps: int = 2000
    rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0
    # More training arguments, for machines that take them.
    more: ClassVar[Mapping[str, Any]] = {}

    @property
    def _config(self) -> dict[str, Any]:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
        return {
            "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32, "num_channels": 3,
            "id2label": {str(i): str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)},
            **{name: getattr(self, name) for name in sizes},
        }  # fmt: skip

    def write_data(self, folder: Path) -> None:
        """Write train, validation and test.parquet in a random order: 5,000 training images choose the rates."""
        import pyarrow.parquet as parquet

        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "validation.parquet").is_file():
            return
        # As they come, they lie class by class.
        train, test = (parquet.read_table(IMAGES / f"{split}.parquet") for split in ("train", "test"))
        order = np.random.default_rng(0).permutation(train.num_rows)
        held_out, kept = order[:_NUM_HELD_OUT], order[_NUM_HELD_OUT:]
        parquet.write_table(test.take(np.random.default_rng(0).permutation(test.num_rows)), folder / "test.parquet")
        parquet.write_table(train.take(kept), folder / "train.parquet")
        parquet.write_table(train.take(held_out), folder / "validation.parquet.partial")
        (folder / "validation.parquet.partial").replace(folder / "validation.parquet")

    def shorter(self, part: int) -> Settings:
        """Return the same with so small a part of the steps."""
        return replace(self, steps=self.steps // part)

    def made(self, progress: Progress) -> tuple[Path, Cost]:
        """Return the folder of the trained source, and what its training took; a finished one at once."""
        home = CACHE / f"vit-{key_of(self)}"
        config = home.with_name(f"{home.name}-config")
        config.mkdir(parents=True, exist_ok=True)
        write_json(config / "config.json", self._config)
        self.write_data(CACHE / "images")
        asked = {
            "output": str(home), "random": str(config),
            "data": {"train": str(CACHE / "images" / "train.parquet")},
            "training": {
                "max_steps": self.steps, "per_device_train_batch_size": self.batch, "learning_rate": self.rate,
                "weight_decay": self.weight_decay, "seed": self.seed, "logging_steps": 100, **self.more,
            },
        }  # fmt: skip
        asked = train_config(asked, "pictures.py")
        found = train(asked, command="anysize train", origin="pictures.py", progress=progress)
        # An image is one example, whatever its pixels.
        return home, cost_of(home, found["train_s"], self.steps * self.batch, 1)
