"""Tokens a second of `anysize train` beside a bare PyTorch loop: the same model, batches, optimizer and schedule.

    python -m benchmarks.throughput.run [--quick]

Both train in one process, in turns: each round takes some steps of either, and the figure is the ratio of their times
in a round. The bare loop does what training needs and nothing else: forward, backward, clipping, AdamW, schedule. On an
accelerator the model is larger, in bfloat16 and compiled, and what both do of the device's peak is told as well.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from anysize.config import understand
from anysize.flops import flops_a_second, peak_flops, training_flops
from anysize.training.arguments import fixed_arguments, training_arguments, with_defaults
from anysize.training.data import Datasets
from anysize.training.loop import run
from anysize.training.start import Start
from anysize.training.tokens import stacked
from benchmarks.checkpoints import llama_config
from benchmarks.measure import write_results

ASKED = 0.97
_RATE, _WARM = 1e-3, 4


@dataclass(frozen=True)
class _Setting:
    """What is trained, on batches of which size, and how."""

    sizes: dict[str, Any]
    batch: int
    length: int
    accelerated: bool

    @property
    def config(self) -> dict[str, Any]:
        return llama_config(**self.sizes)


_SMALL = _Setting(
    {"hidden": 128, "ffn": 344, "heads": 8, "kv_heads": 4, "vocab": 2048, "layers": 4, "dtype": "float32"},
    batch=16, length=128, accelerated=False,
)  # fmt: skip
_LARGE = _Setting(
    {"hidden": 1024, "ffn": 2816, "heads": 16, "kv_heads": 8, "vocab": 8192, "layers": 10, "dtype": "float32"},
    batch=32, length=1024, accelerated=True,
)  # fmt: skip


class _Random(Dataset[dict[str, torch.Tensor]]):
    """Sequences of random tokens, read from memory as packed ones are."""

    def __init__(self, count: int, setting: _Setting) -> None:
        shape = (count, setting.length)
        self._ids = np.random.default_rng(0).integers(0, setting.sizes["vocab"], shape, np.uint16)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone(), "sequence": torch.tensor(index)}


def _model(raw: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{k: v for k, v in raw.items() if k != "architectures"}))


def _ours(setting: _Setting, data: Dataset[Any], steps: int) -> float:
    """Return the seconds a step of a run of ours, from its start to its end but for the first steps."""
    raw = setting.config
    with tempfile.TemporaryDirectory() as folder:
        given = with_defaults({
            "max_steps": steps, "per_device_train_batch_size": setting.batch, "learning_rate": _RATE,
            "save_strategy": "no", "logging_steps": 10, "use_cpu": not setting.accelerated, "bf16": setting.accelerated,
            "torch_compile": setting.accelerated,
        })  # fmt: skip
        args = training_arguments({**given, **fixed_arguments(folder)}, "throughput")
        marks: list[float] = []

        def progress(stage: str, done: int, total: int) -> None:
            del stage, done, total
            marks.append(time.perf_counter())

        datasets = Datasets(data, {}, setting.length, len(data), {}, "random", stacked)  # type: ignore[arg-type]
        run(Start(_model(raw), understand(raw), folder), datasets, args, progress=progress)
    return (marks[-1] - marks[_WARM]) / (len(marks) - 1 - _WARM)


def _batches(data: Dataset[Any], setting: _Setting, seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    loader: DataLoader[Any] = DataLoader(data, setting.batch, shuffle=True, generator=generator, collate_fn=stacked)
    while True:
        yield from loader


def _bare(setting: _Setting, data: Dataset[Any], steps: int) -> float:
    """Return the seconds a step of a loop that has nothing but what it needs."""
    device = "cuda" if setting.accelerated else "cpu"
    model: Any = _model(setting.config).to(device).train()
    if setting.accelerated:
        model = torch.compile(model)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches, begin = _batches(data, setting, 0), 0.0
    for step in range(steps):
        batch = next(batches)
        ids = batch["input_ids"].to(device)
        with torch.autocast(device, torch.bfloat16, enabled=setting.accelerated):
            loss = model(input_ids=ids, labels=batch["labels"].to(device), use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step == _WARM:
            _wait(setting)
            begin = time.perf_counter()
    _wait(setting)
    return (time.perf_counter() - begin) / (steps - 1 - _WARM)


def _wait(setting: _Setting) -> None:
    """Wait for what an accelerator is still busy with."""
    if setting.accelerated:
        torch.cuda.synchronize()


def main() -> None:
    """Run the suite and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; nothing is written")
    asked = parser.parse_args()
    rounds, steps = (2, 25) if asked.quick else (7, 60)
    setting = _LARGE if torch.cuda.is_available() else _SMALL
    data = _Random(2048, setting)
    flops = setting.length * setting.batch * training_flops(understand(setting.config), setting.length)
    device = torch.cuda.get_device_name(0) if setting.accelerated else ""
    peak = peak_flops(device)
    speeds: dict[str, list[float]] = {"_bare": [], "_ours": []}
    ratios: list[float] = []
    for number in range(rounds):
        # Who goes first changes, so that what slows the machine down over time meets both.
        order = (_bare, _ours) if number % 2 else (_ours, _bare)
        found = {call.__name__: call(setting, data, steps) for call in order}
        for name, seconds in found.items():
            speeds[name].append(flops / seconds)
        ratios.append(found["_bare"] / found["_ours"])
        print({name.strip("_"): f"{setting.batch * setting.length / seconds:,.0f} tokens/s, "
               f"{flops_a_second(flops / seconds)}" for name, seconds in found.items()})  # fmt: skip
    results = {
        "sizes": setting.sizes, "batch": setting.batch, "length": setting.length, "steps": steps, "asked": ASKED,
        "device": device, "flops_per_s": {name.strip("_"): median(found) for name, found in speeds.items()},
        "utilization": {name.strip("_"): median(found) / peak for name, found in speeds.items()} if peak else None,
        "share_of_bare": {"median": median(ratios), "min": min(ratios), "max": max(ratios)}, "rounds": ratios,
    }  # fmt: skip
    print(results["share_of_bare"])
    if not asked.quick:
        print(write_results(__file__, results, name="accelerator" if setting.accelerated else "latest"))


if __name__ == "__main__":
    main()
