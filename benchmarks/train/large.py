"""The sources of the suites for an accelerator: a hundred million parameters, in bfloat16 and compiled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from anysize.io.whole import write_json
from anysize.progress import Progress
from anysize.training.config import train_config
from anysize.training.run import train
from benchmarks.measure import CACHE
from benchmarks.train import novels, pictures
from benchmarks.train.sources import Cost, cost_of, key_of

# As the arms of these suites have it.
ACCELERATED: Mapping[str, Any] = {"bf16": True, "torch_compile": True}


@dataclass(frozen=True)
class Text(novels.Settings):
    """A Llama of 126 million parameters on novels, trained by `anysize train`."""

    vocab_size: int = 8192
    hidden_size: int = 1024
    intermediate_size: int = 2816
    num_hidden_layers: int = 10
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    context: int = 512
    batch: int = 64
    steps: int = 1000
    rate: float = 1e-3
    more: ClassVar[Mapping[str, Any]] = ACCELERATED

    def made(self, progress: Progress) -> tuple[Path, Cost]:
        """Return the folder of the trained source, the state of its optimizer with it, and what its training took."""
        home = CACHE / f"large-{key_of(self)}"
        config, data = home.with_name(f"{home.name}-config"), CACHE / f"seen-{self.train_characters}"
        if not (config / "config.json").is_file():
            rows = novels.seen_rows(self)
            novels.write_rows(data / "train.parquet", rows)
            config.mkdir(parents=True, exist_ok=True)
            place = config / "plain.json"
            novels.new_tokenizer("\n\n".join(rows), self.vocab_size).save(str(place))
            novels.save_tokenizer(place, config)
            place.unlink()
            write_json(config / "config.json", novels.config(self))
        asked = {
            "output": str(home), "random": str(config), "keep_optimizer": True,
            "data": {"train": str(data / "train.parquet"), "column": "text", "sequence_length": self.context},
            "training": {
                "max_steps": self.steps, "per_device_train_batch_size": self.batch, "learning_rate": self.rate,
                "weight_decay": self.weight_decay, "seed": self.seed, "logging_steps": 50, **self.more,
            },
        }  # fmt: skip
        found = train(train_config(asked, "large.py"), command="anysize train", origin="large.py", progress=progress)
        return home, cost_of(home, found["train_s"], self.steps * self.batch * self.context, self.context)


@dataclass(frozen=True)
class Pictures(pictures.Settings):
    """A ViT of 126 million parameters on CIFAR-10."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 10
    num_attention_heads: int = 16
    batch: int = 256
    steps: int = 1500
    rate: float = 3e-4
    more: ClassVar[Mapping[str, Any]] = ACCELERATED
