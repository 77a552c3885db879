"""What a run would take: states are exact, FSDP divides them, and the examples can be planned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.checkpoints import SMOLLM2, hollow_checkpoint

from anysize.comparison.config import compare_config
from anysize.config import understand
from anysize.io.models import new_model
from anysize.training.config_file import read_yaml
from anysize.training.memory import training_memory
from tests import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_states_are_what_adamw_keeps() -> None:
    config = understand(tiny.source(tiny.VARIANTS[0]).config)
    model: Any = new_model(config.model_class, config.full, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.ones(2, 5, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    kept = list(model.parameters()) + [p.grad for p in model.parameters()]
    kept += [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    found = training_memory(config, None, batch=2, length=5, half=False, checkpointing=False, shards=1)
    assert found.states == sum(tensor.numel() * 4 for tensor in kept)
    shared = training_memory(config, None, batch=2, length=5, half=False, checkpointing=False, shards=4)
    assert shared.states == found.states // 4
    assert (shared.activations, shared.logits) == (found.activations, found.logits)


def test_half_precision_checkpointing_and_no_teacher_take_less() -> None:
    config = understand(SMOLLM2["HuggingFaceTB/SmolLM2-135M"])

    def total(**changes: Any) -> int:
        settings = {"batch": 4, "length": 512, "half": True, "checkpointing": True, "shards": 1}
        return training_memory(config, None, **{**settings, **changes}).total  # type: ignore[arg-type]

    assert total() < total(checkpointing=False) < total(checkpointing=False, half=False)
    assert total(batch=8) > 1.5 * total() / 2
    taught = training_memory(config, config, batch=4, length=512, half=True, checkpointing=True, shards=1)
    assert taught.teacher == 4 * 134_515_008
    assert taught.total > total()


@pytest.mark.parametrize("name", ["one-gpu/shrink.yaml", "one-gpu/grow.yaml", "several-nodes/grow.yaml"])
def test_examples_can_be_planned(name: str, tmp_path: Path, cli: Callable[..., Any]) -> None:
    raw = read_yaml(EXAMPLES / name)
    place = tmp_path / "source"
    hollow_checkpoint(place, SMOLLM2[raw["resize"]["source"]], num_files=1, storage="BF16")
    done = cli("train", EXAMPLES / name, "--plan-only", "--json", "--set", f"resize.source={place}")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    wanted = float(raw["resize"]["num_params"][:-1]) * (1e9 if raw["resize"]["num_params"].endswith("B") else 1e6)
    assert found["num_parameters"] == pytest.approx(wanted, rel=0.03)
    assert found["memory_bytes"]["8 with FSDP"]["total"] < found["memory_bytes"]["1, or each under DDP"]["total"]
    assert not Path(raw["output"]).exists()


def test_the_example_of_a_comparison_is_one() -> None:
    made = compare_config(read_yaml(EXAMPLES / "one-gpu" / "compare.yaml"), "compare.yaml")
    assert made.goals == ("random", "subcloning")
