"""How much a shrunk start saves on images: a ViT pretrained on CIFAR-10, cut to half its width, trained again.

    python -m benchmarks.shrink.vision [--quick]

Every arm sees the same batches (flipped at random). The error rate, a share of images, takes the place of the loss: of
5,000 training images held out to choose rates, and of the test images for every figure.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import anysize
from anysize.calibration.scores import FORMAT, Scores
from anysize.executor import target_tensors
from anysize.io.models import build_model
from anysize.io.reader import Checkpoint
from benchmarks.measure import DATA, write_results
from benchmarks.race import CACHE, Found, Job, carry_out, raced, summary, timed

IMAGES = DATA / "cifar10"
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
GOALS = ("random", "subcloning")
ARMS: dict[str, dict[str, Any]] = {
    "random": {},
    "subcloning": {"preset": "subcloning"},
    "subspace": {"preset": "subspace"},
    "subspace, half the steps": {"preset": "subspace"},
}
_QUICK = ("random", "subcloning", "subspace")
_HALF = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3}
_SCORES = f"scores-{FORMAT}.safetensors"
_HELD_OUT, _EVALUATIONS, _CALIBRATION_IMAGES = 5_000, 20, 2_048


@dataclass(frozen=True)
class Settings:
    """What the source is made of."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 6
    patch_size: int = 4
    batch: int = 64
    steps: int = 3000
    rate: float = 2e-3
    weight_decay: float = 0.05
    seed: int = 0

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def config(self) -> dict[str, Any]:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "patch_size")
        return {
            "model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 32,
            "id2label": {str(i): str(i) for i in range(10)}, "label2id": {str(i): i for i in range(10)},
            **{name: getattr(self, name) for name in sizes},
        }  # fmt: skip


@cache
def images(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (pixels uint8 [n, 3, 32, 32], labels int64 [n]) of a split, decoded once and cached."""
    place = CACHE / "cifar10" / f"{split}.npz"
    if not place.is_file():
        import pyarrow.parquet as parquet
        from PIL import Image

        table = parquet.read_table(IMAGES / f"{split}.parquet")
        raw = [row["bytes"] for row in table.column("image").to_pylist()]
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(b)).convert("RGB")).transpose(2, 0, 1) for b in raw])
        place.parent.mkdir(parents=True, exist_ok=True)
        np.savez(place, pixels=pixels, labels=np.array(table.column("label").to_pylist()))
    found = np.load(place)
    return torch.from_numpy(found["pixels"]), torch.from_numpy(found["labels"])


def _as_input(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def error_rate(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images that a model puts into a wrong class."""
    wrong = [
        (model(pixel_values=_as_input(p)).logits.argmax(-1) != y).sum()
        for p, y in zip(pixels.split(250), labels.split(250), strict=True)
    ]
    return float(torch.stack(wrong).sum()) / len(labels)


def train(model: Any, settings: Settings, job: Job, at: list[int]) -> Found:
    """Train a model on batches that the seed alone decides; return error rates at the asked steps."""
    pixels, labels = images("train")
    kept, held = slice(0, -_HELD_OUT), slice(-_HELD_OUT, None)
    splits = {"validation": (pixels[held], labels[held]), "test": images("test")}
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": job.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job.rate, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(job.seed)
    found: Found = {"at": at, "validation": [], "test": []}
    spent = 0.0
    for step in range(job.steps + 1):
        if step in at:
            model.eval()
            for split, (x, y) in splits.items():
                found[split].append(error_rate(model, x, y))
            model.train()
        if step == job.steps:
            break
        begin = time.process_time()
        scale = min(1.0, (step + 1) / (0.05 * job.steps)) * (0.1 + 0.45 * (1 + np.cos(np.pi * step / job.steps)))
        for group in optimizer.param_groups:
            group["lr"] = job.rate * scale
        chosen = torch.randint(0, len(pixels[kept]), (settings.batch,), generator=generator)
        x = _as_input(pixels[chosen])
        flipped = torch.rand(settings.batch, generator=generator) < 0.5
        x[flipped] = x[flipped].flip(-1)
        loss = torch.nn.functional.cross_entropy(model(pixel_values=x).logits, labels[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.process_time() - begin
    return {**found, "train_s": spent}


def _fresh(settings: Settings, sizes: dict[str, int], seed: int) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig.from_dict({**settings.config, **sizes}))


def source(settings: Settings) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the pretrained source and what its making cost; made once and cached."""
    home = CACHE / f"vit-{settings.key}"
    if not (home / "made.json").is_file():
        model = _fresh(settings, {}, settings.seed)
        job = Job("source", "source", settings.rate, settings.seed, settings.steps, settings.steps, 0.05)
        run = train(model, settings, job, [settings.steps])
        model.save_pretrained(home)
        made = {"test_error": run["test"][0], "cpu_s": run["train_s"], "settings": asdict(settings)}
        (home / "made.json").write_text(json.dumps(made))
    record = home / f"calibrated-{FORMAT}.json"
    if not record.is_file():
        scores, seconds = timed(lambda: anysize.calibrate(home, IMAGES / "train.parquet", tokens=_CALIBRATION_IMAGES))
        scores.save(home / _SCORES)
        record.write_text(json.dumps({"calibration_s": seconds}))
    return home, json.loads((home / "made.json").read_text()) | json.loads(record.read_text())


def make(job: Job, settings: Settings) -> tuple[Any, float]:
    """Return the model that a job starts from, and the seconds that its conversion took."""
    if not ARMS[job.arm]:
        return timed(lambda: _fresh(settings, _HALF, 1000 + job.seed))
    home, _ = source(settings)
    scores = Scores.load(home / _SCORES)

    def convert() -> Any:
        plan = anysize.plan(home, seed=job.seed, calibration=scores, **_HALF, **ARMS[job.arm])
        return build_model(plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(home)), torch.float32)

    return timed(convert)


def _run(job: Job, settings: Settings) -> Found:
    at = sorted({round(job.steps * i / _EVALUATIONS) for i in range(_EVALUATIONS + 1)})
    return carry_out(job, lambda j: make(j, settings), lambda m, j: train(m, settings, j, at))


def run_full(job: Job) -> Found:
    """Carry out one job of the whole suite."""
    return _run(job, Settings())


def run_quick(job: Job) -> Found:
    """Carry out one job of the quick suite, whose source is trained for fewer steps."""
    return _run(job, replace(Settings(), steps=1000))


def main() -> None:
    """Run the suite and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer arms, steps and rates")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, one thread each")
    asked = parser.parse_args()
    quick: bool = asked.quick
    if not IMAGES.is_dir():
        raise SystemExit(f"the images are not here ({IMAGES.name}): this suite needs them")
    settings = replace(Settings(), steps=1000) if quick else Settings()
    whole = 300 if quick else 800
    seeds, rates = ((0,), RATES[1:3]) if quick else ((0, 1, 2), RATES)
    begin = time.perf_counter()
    _, made = source(settings)
    arms = [arm for arm in ARMS if not quick or arm in _QUICK]

    def job(arm: str, rate: float, seed: int) -> Job:
        steps = whole // 2 if arm.endswith("half the steps") else whole
        return Job("vision, half width", arm, rate, seed, steps, whole, settings.weight_decay)

    runs = raced(arms, rates, seeds, job, run_quick if quick else run_full, asked.workers)
    extra = {arm: made["calibration_s"] if ARMS[arm] else 0.0 for arm in arms}
    table: dict[str, Any] = {"sizes": _HALF, "summary": summary(runs, GOALS, extra), "runs": runs}
    results: dict[str, Any] = {
        "source": made, "steps": whole, "seeds": list(seeds), "rates": list(rates), "images_a_step": settings.batch,
        "suite_s": time.perf_counter() - begin, "tables": {"vision, half width": table},
    }  # fmt: skip
    write_results(__file__, results, seed=seeds[0], name="vision-quick" if quick else "vision")
    for row in table["summary"]:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
