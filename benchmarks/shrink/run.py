"""How much a shrunk start saves: arms x learning rates x seeds on the same tokens, against random initialization.

    python -m benchmarks.shrink.run [--quick]

A Llama of about a million parameters is pretrained on novels (cached), cut to half its width, heads and feed-forward,
and each arm is trained on the same batches. Rates are chosen on the validation books with the first seed; every figure
is of the test books. Each run is cached when it ends, so that a stopped suite goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

import anysize
from anysize.calibration.scores import Scores
from anysize.executor import target_tensors
from anysize.io.models import build_model
from anysize.io.reader import Checkpoint
from benchmarks.measure import write_results
from benchmarks.shrink.source import CACHE, NOVELS, Settings, config, held_out_loss, source, tokens, train

HERE = Path(__file__).parent
ARMS: dict[str, dict[str, Any]] = json.loads((HERE / "arms.json").read_text(encoding="utf-8"))
HALF = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 2}
RATES = (1e-3, 2e-3, 4e-3)
_CALIBRATION: dict[str, Any] = {"tokens": 131_072, "sequence_length": 128, "batch_size": 16}


def _model(arm: str, depth: int, scores: Scores, home: Path, settings: Settings, seed: int) -> tuple[Any, float]:
    """Return an arm's model before training, and the seconds that its conversion took."""
    begin = time.perf_counter()
    sizes = {**HALF, "num_hidden_layers": depth}
    if ARMS[arm].get("init") == "random":
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(1000 + seed)
        small: dict[str, Any] = {**config(settings), **sizes}
        return LlamaForCausalLM(LlamaConfig.from_dict(small)), time.perf_counter() - begin
    options = dict(ARMS[arm]["options"])
    if options.get("preset") == "weight-selection":
        plan = anysize.plan(home, seed=seed, **sizes, **options)
    else:
        plan = anysize.plan(home, seed=seed, calibration=scores, **sizes, **options)
    made = build_model(plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(home)), torch.float32)
    return made, time.perf_counter() - begin


def _run(
    arm: str, depth: int, rate: float, seed: int, steps: int, evals: int, scores: Scores, home: Path, settings: Settings
) -> dict[str, Any]:
    """Return one run: losses on validation and test books at evenly spread steps, and what it cost."""
    key = json.dumps([arm, ARMS[arm], depth, rate, seed, steps, evals, asdict(settings), scores.record.tokens, HALF])
    cached = CACHE / "shrink" / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"
    if cached.is_file():
        return json.loads(cached.read_text())
    ids = tokens(settings)
    model, conversion_s = _model(arm, depth, scores, home, settings, seed)
    half = ids["train"][ids["train"].numel() // 2 :]
    at = sorted({round(steps * i / evals) for i in range(evals + 1)})

    def losses(m: Any) -> dict[str, float]:
        return {split: held_out_loss(m, ids[split], settings, 192) for split in ("validation", "test")}

    run = train(model, half, settings, steps=steps, rate=rate, weight_decay=settings.weight_decay, seed=seed,
                evaluate=dict.fromkeys(at, losses))  # fmt: skip
    found: dict[str, Any] = {
        "arm": arm, "depth": depth, "rate": rate, "seed": seed, "conversion_s": conversion_s, "train_s": run["wall_s"],
        "steps": at, **{s: [run["losses"][i][s] for i in at] for s in ("validation", "test")},
    }  # fmt: skip
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_text(json.dumps(found))
    print(f"{arm:24} depth {depth} rate {rate:g} seed {seed}: {found['test'][0]:.3f} -> {found['test'][-1]:.3f}, "
          f"{run['wall_s']:.0f} s", flush=True)  # fmt: skip
    return found


def steps_to(run: dict[str, Any], loss: float) -> float | None:
    """Return the (interpolated) step at which a run's test loss first is at a level; None where it never is."""
    points: list[tuple[int, float]] = list(zip(run["steps"], run["test"], strict=True))
    if points[0][1] <= loss:
        return 0.0
    for (a, before), (b, after) in itertools.pairwise(points):
        if after <= loss:
            return a + (b - a) * (before - loss) / (before - after)
    return None


def _summary(
    runs: list[dict[str, Any]], best: dict[str, float], calibration_s: float, steps: int
) -> list[dict[str, Any]]:
    """Return a row an arm: medians over seeds, against the random arm's and the subcloning arm's final losses."""
    chosen = {arm: [r for r in runs if r["arm"] == arm and r["rate"] == best[arm]] for arm in best}
    goals = {arm: median(r["test"][-1] for r in chosen[arm]) for arm in chosen}
    rows: list[dict[str, Any]] = []
    for arm, found in chosen.items():
        reached = {goal: [steps_to(r, goals[goal]) for r in found] for goal in ("random", "subcloning")}
        whole = {
            g: median(v for v in r if v is not None) if all(v is not None for v in r) else None
            for g, r in reached.items()
        }
        per_step = median(r["train_s"] for r in found) / steps
        extra = 0.0 if arm in ("random", "weight-selection") else calibration_s
        conversion = median(r["conversion_s"] for r in found)
        to_random = whole["random"]
        rows.append(
            {
                "arm": arm, "rate": best[arm], "seeds": len(found),
                "loss_before": median(r["test"][0] for r in found),
                "loss_after": goals[arm], "loss_after_of_seeds": [r["test"][-1] for r in found],
                "steps_to_random": to_random, "share_of_random_steps": None if to_random is None else to_random / steps,
                "share_of_subcloning_steps": None if whole["subcloning"] is None else whole["subcloning"] / steps,
                "conversion_s": conversion, "calibration_s": extra,
                "seconds_to_random": None if to_random is None else extra + conversion + to_random * per_step,
                "train_s": per_step * steps,
            }
        )  # fmt: skip
    return rows


def _before(scores: Scores, home: Path, settings: Settings, ids: torch.Tensor) -> dict[str, dict[str, float]]:
    """Return the test loss of every arm before any training, at full and at half depth."""
    found: dict[str, dict[str, float]] = {}
    for depth in (settings.num_hidden_layers, settings.num_hidden_layers // 2):
        models = {arm: _model(arm, depth, scores, home, settings, 0)[0].eval() for arm in ARMS}
        found[f"depth {depth}"] = {arm: held_out_loss(m, ids, settings, 192) for arm, m in models.items()}
    return found


def main() -> None:
    """Run the suite and write its results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, fewer arms, steps and rates")
    parser.add_argument("--steps", type=int, default=None, help="training steps of every arm")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), help="only these (random is always among them)")
    parser.add_argument("--depths", nargs="*", type=int, default=None, help="layers of the targets")
    asked = parser.parse_args()
    quick: bool = asked.quick
    steps: int = asked.steps or (400 if quick else 1500)
    seeds, rates = ((0,), RATES[1:]) if quick else ((0, 1, 2), RATES)
    arms = [
        a
        for a in ARMS
        if (a in (*asked.arms, "random", "subcloning") if asked.arms else not quick or ARMS[a].get("quick"))
    ]
    if not NOVELS.is_dir():
        raise SystemExit(f"the novels are not here ({NOVELS.name}): this suite needs them")
    begin = time.perf_counter()
    settings = replace(Settings(), steps=800) if quick else Settings()
    home, made = source(settings)
    started = time.perf_counter()
    scores = anysize.calibrate(home, NOVELS / "train.parquet", **_CALIBRATION)
    calibration_s = time.perf_counter() - started
    ids = tokens(settings)
    from transformers import LlamaForCausalLM

    source_loss = held_out_loss(LlamaForCausalLM.from_pretrained(home).eval(), ids["test"], settings, 192)
    evals = 20 if quick else 30
    tables: dict[str, Any] = {}
    for depth in (
        (settings.num_hidden_layers,) if quick else (settings.num_hidden_layers, settings.num_hidden_layers // 2)
    ):
        tuning = [
            _run(arm, depth, rate, seeds[0], steps, evals, scores, home, settings) for arm in arms for rate in rates
        ]
        best = {
            arm: min((r for r in tuning if r["arm"] == arm), key=lambda r: r["validation"][-1])["rate"] for arm in arms
        }
        rest = [
            _run(arm, depth, best[arm], seed, steps, evals, scores, home, settings)
            for seed in seeds[1:]
            for arm in arms
        ]
        runs = tuning + rest
        tables[f"depth {depth}"] = {"summary": _summary(runs, best, calibration_s, steps), "runs": runs}
    before = _before(scores, home, settings, ids["test"])
    results = {
        "before": before,
        "source": {**made, "test_loss": source_loss}, "steps": steps, "seeds": list(seeds), "rates": list(rates),
        "tokens_a_step": settings.batch * settings.context, "calibration_s": calibration_s, "half": HALF,
        "suite_s": time.perf_counter() - begin, "tables": tables,
    }  # fmt: skip
    write_results(__file__, results, seed=seeds[0], name="quick" if quick else "latest")
    for name, table in tables.items():
        print(name)
        for row in table["summary"]:
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
