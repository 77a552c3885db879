"""What each arm starts from, and how it is trained on novels."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import anysize
from anysize.calibration.scores import FORMAT, Scores
from anysize.executor import target_tensors
from anysize.io.models import build_model
from anysize.io.reader import Checkpoint
from anysize.shrink import reads_scores
from benchmarks.race import Found, Job, carry_out, timed
from benchmarks.train.novels import NOVELS, TEACHER_WEIGHT, Settings, config, held_out_loss, source, tokens, train

ARMS: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "arms.json").read_text(encoding="utf-8"))
# The target.
SIZES = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK_SOURCE_STEPS = 800
_EVALUATIONS, _WINDOWS = 30, 192
_CALIBRATION: dict[str, Any] = {"tokens": 131_072, "sequence_length": 128, "batch_size": 16}


def settings_of(*, quick: bool) -> Settings:
    """Return what the source is made of."""
    return replace(Settings(), steps=QUICK_SOURCE_STEPS) if quick else Settings()


@cache
def scores_of(settings: Settings) -> tuple[Scores, float]:
    """Return the scores of a source, calibrated once, and the seconds that it took then."""
    home, _ = source(settings)
    place, record = home / f"scores-{FORMAT}.safetensors", home / f"calibrated-{FORMAT}.json"
    if not record.is_file():
        _, seconds = timed(lambda: anysize.calibrate(home, NOVELS / "train.parquet", output=place, **_CALIBRATION))
        record.write_text(json.dumps({"seconds": seconds}))
    return Scores.load(place), json.loads(record.read_text())["seconds"]


def takes_scores(arm: str) -> bool:
    """Whether an arm is chosen or fitted by what calibration found."""
    if "options" not in ARMS[arm]:
        return False
    options = ARMS[arm]["options"]
    preset, select, readers = (options.get(n, "auto") for n in ("preset", "select", "readers"))
    return reads_scores(preset, select, readers, "auto", list(SIZES))


def make(job: Job, *, quick: bool) -> tuple[Any, float]:
    """Return the model that a job starts from, and the seconds that its conversion took."""
    arm, settings = ARMS[job.arm], settings_of(quick=quick)
    if arm.get("init") == "random":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1000 + job.seed)
        return timed(lambda: LlamaForCausalLM(LlamaConfig.from_dict({**config(settings), **SIZES})))
    home, _ = source(settings)
    scores = scores_of(settings)[0] if takes_scores(job.arm) else None

    def convert() -> Any:
        plan = anysize.plan(home, seed=job.seed, calibration=scores, **SIZES, **arm["options"])
        return build_model(plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(home)), torch.float32)

    return timed(convert)


def _train(model: Any, job: Job, *, quick: bool) -> Found:
    settings = settings_of(quick=quick)
    ids = tokens(settings)
    at = sorted({round(job.steps * i / _EVALUATIONS) for i in range(_EVALUATIONS + 1)})

    def losses(m: Any) -> dict[str, float]:
        return {split: held_out_loss(m, ids[split], settings, _WINDOWS) for split in ("validation", "test")}

    # The source was trained on the first half of the tokens.
    half = ids["train"][ids["train"].numel() // 2 :]
    teacher = None
    if ARMS[job.arm].get("distill"):
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(source(settings)[0]).eval()
    run = train(model, half, settings, steps=job.steps, rate=job.rate, weight_decay=job.weight_decay, seed=job.seed,
                evaluate=dict.fromkeys(at, losses), teacher=teacher)  # fmt: skip
    return {
        "train_s": run["cpu_s"], "at": at, **{s: [run["losses"][i][s] for i in at] for s in ("validation", "test")}
    }  # fmt: skip


def _carry_out(job: Job, *, quick: bool) -> Found:
    # The source, which teaches, and its data and batches follow from its settings.
    told = f"{settings_of(quick=quick).key} {TEACHER_WEIGHT} {_EVALUATIONS} {_WINDOWS}"
    return carry_out(job, lambda j: make(j, quick=quick), lambda m, j: _train(m, j, quick=quick), told)


def run_full(job: Job) -> Found:
    """Carry out one job of the whole suite."""
    return _carry_out(job, quick=False)


def run_quick(job: Job) -> Found:
    """Carry out one job of the quick suite, whose source is trained for fewer steps."""
    return _carry_out(job, quick=True)
