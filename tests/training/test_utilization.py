"""Model FLOPs a second: of the steps as they were, teacher included, held against peaks that are known by name."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anysize.config import read_config, understand
from anysize.flops import flops_a_second, forward_flops, peak_flops, training_flops
from anysize.io.models import build_model
from anysize.progress import quiet
from anysize.training.config import train_config
from anysize.training.run import train
from anysize.training.tokens import Sequences
from anysize.training.trainer import Account
from tests import tiny
from tests.training.runs import config_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307e12),
    ],
)
def test_a_peak_is_known_by_the_name_that_a_driver_gives(name: str, peak: float) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA H20",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
    ],
)
def test_a_part_of_a_device_and_its_namesakes_have_no_peak_that_is_known(name: str) -> None:
    assert peak_flops(name) is None


def test_the_speed_is_that_of_the_median_step() -> None:
    account = Account()
    assert account.flops_per_s is None
    # The first one compiles.
    for seconds in (100.0, 2.0, 2.0, 2.0, 4.0):
        account.teacher_flops += 1e9
        account.add_step(seconds, 3e9)
    assert account.flops_per_s == pytest.approx(2e9)
    assert account.train_s == 110


@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_operations_are_those_that_a_profiler_counts(variant: tiny.Variant) -> None:
    source = tiny.source(variant)
    config = understand(source.config)
    model: Any = build_model(
        config.model_class, config.full, {n: source.read(n) for n in source.tensors}, torch.float32
    )
    model.set_attn_implementation("eager")
    length, batch, image = 16, 2, config.architecture.modality == "image"
    asked = {"pixel_values": torch.zeros(batch, 3, 12, 12)} if image else {
        "input_ids": torch.ones(batch, length, dtype=torch.long)}  # fmt: skip
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**asked)
    rows = batch if image else batch * length
    # Angles of rotary positions are products, too, and the tiny models make much of them.
    assert forward_flops(config, length) == pytest.approx(counter.get_total_flops() / rows, rel=0.005)


@pytest.mark.parametrize("taught", [False, True])
def test_a_run_counts_the_model_in_every_batch_of_a_step_and_its_teacher(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taught: bool
) -> None:
    ticks = count()
    # Each look at it is a second later.
    monkeypatch.setattr("anysize.training.trainer.clock_of", lambda _: lambda: float(next(ticks)))
    training = {"max_steps": 3, "gradient_accumulation_steps": 2, "eval_strategy": "no"}
    asked = config_of(llama, story, tmp_path / "out", training=training)
    if taught:
        asked["distill"] = {"weight": 0.5, "teacher": str(llama)}
    found = train(train_config(asked, "x"), command="", origin="x", progress=quiet)
    understood = understand(read_config(llama))
    tokens = 2 * 4 * 32
    wanted = tokens * training_flops(understood, 32)
    # A step begins and ends; in it a teacher begins and ends, once a batch.
    seconds = 1
    if taught:
        wanted, seconds = wanted + tokens * forward_flops(understood, 32), 5
    assert found["flops_per_s"] == pytest.approx(wanted / seconds)
    # No peak of a processor is known, so nothing is held against one.
    assert (found["device"], found["utilization"]) == ("", None)


def test_speeds_are_told_in_the_unit_that_fits() -> None:
    assert [flops_a_second(value) for value in (4.123e14, 9.9e10, 5e6)] == ["412 TFLOP/s", "99 GFLOP/s", "5 MFLOP/s"]


def test_every_run_of_a_process_is_compiled(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import config as dynamo
    from torch._dynamo.utils import counters

    # As many as a comparison has runs would take too long here.
    monkeypatch.setattr(dynamo, "recompile_limit", 1)
    compiled: list[int] = []
    for number in range(3):
        before = counters["stats"]["unique_graphs"]
        training = {"max_steps": 1, "bf16": True, "use_cpu": True, "torch_compile": True, "eval_strategy": "no",
                    "torch_compile_backend": "eager"}  # fmt: skip
        asked = config_of(llama, story, tmp_path / f"out{number}", training=training)
        train(train_config(asked, "x"), command="", origin="x", progress=quiet)
        compiled.append(counters["stats"]["unique_graphs"] - before)
    assert min(compiled) > 0


def test_waiting_for_data_counts(llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("anysize.training.trainer.clock_of", lambda _: lambda: now)
    read = Sequences.__getitem__

    def slow(self: Sequences, index: int) -> dict[str, torch.Tensor]:
        nonlocal now
        now += 1.0
        return read(self, index)

    monkeypatch.setattr(Sequences, "__getitem__", slow)
    training = {"max_steps": 3, "eval_strategy": "no"}
    asked = config_of(llama, story, tmp_path / "out", training=training)
    found = train(train_config(asked, "x"), command="", origin="x", progress=quiet)
    # Three steps of four sequences; what is fetched ahead of a step is its own.
    assert found["train_s"] >= 3 * 4
