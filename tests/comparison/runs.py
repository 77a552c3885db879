"""A small comparison that tests change and carry out, in this process where they need no others."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from anysize.comparison.compare import compare
from anysize.comparison.config import compare_config
from anysize.report.schema import Results


def config_of(llama: Path, story: Path, output: Path, **changes: Any) -> dict[str, Any]:
    data = {"train": str(story), "validation": str(story), "test": str(story), "sequence_length": 32,
            "evaluation_tokens": 512}  # fmt: skip
    return {
        "output": str(output), "source": str(llama), "data": data, "evaluations": 4, "seeds": [0, 1],
        "target": {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1},
        "calibration": {"tokens": 4096, "sequence_length": 64}, "learning_rates": [1e-3, 4e-3],
        "training": {"max_steps": 8, "per_device_train_batch_size": 4},
        "arms": {"random": {"random": True}, "subspace": {"preset": "subspace", "distill": {"weight": 0.5}}},
        **changes,
    }  # fmt: skip


def carried_out(config: dict[str, Any]) -> Results:
    return compare(
        compare_config(config, "c.yaml"), text="text", command="anysize compare c.yaml", progress=lambda *_: None
    )


class InThisProcess:
    """Stands in for the pool of processes, so that a test need not start any."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, call: Callable[[Any], Any], job: Any) -> Any:
        future: Future[Any] = Future()
        try:
            future.set_result(call(job))
        except Exception as error:
            future.set_exception(error)
        return future
