"""Sources that are grown themselves: another one, resized and trained for a while by `anysize train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from anysize.progress import Progress
from anysize.training.config import train_config
from anysize.training.run import train
from benchmarks.measure import CACHE
from benchmarks.train import novels
from benchmarks.train.sources import Cost, cost_of, key_of


@dataclass(frozen=True)
class Stage:
    """One growth on the way to a target. Its tokens come in another order than those of the arms, with seed 0."""

    of: novels.Settings
    sizes: Mapping[str, int]
    steps: int = 250
    rate: float = 4e-3

    def write_data(self, folder: Path) -> None:
        """Write the data of the source that it is grown from."""
        self.of.write_data(folder)

    def shorter(self, part: int) -> Stage:
        """Return the same with so small a part of the steps, those of what it is grown from as well."""
        return replace(self, of=self.of.shorter(part), steps=self.steps // part)

    def made(self, progress: Progress) -> tuple[Path, Cost]:
        """Return the folder of the grown and trained model, and what it took with all that came before it."""
        source, before = self.of.made(progress)
        home, data = CACHE / f"grown-{key_of(self)}", CACHE / f"unseen-{self.of.train_characters}"
        self.write_data(data)
        asked = {
            "output": str(home), "resize": {"source": str(source), "preset": "fresh", **self.sizes},
            "data": {"train": str(data / "train.parquet"), "column": "text", "sequence_length": self.of.context,
                     "max_tokens": 4_000_000},
            "training": {
                "max_steps": self.steps, "per_device_train_batch_size": self.of.batch, "learning_rate": self.rate,
                "weight_decay": self.of.weight_decay, "data_seed": 1000, "logging_steps": 50,
            },
        }  # fmt: skip
        found = train(train_config(asked, "stages.py"), command="anysize train", origin="stages.py", progress=progress)
        seconds = found["conversion_s"] + found["train_s"]
        own = cost_of(home, seconds, self.steps * self.of.batch * self.of.context, self.of.context)
        return home, {what: before[what] + own[what] for what in own}
