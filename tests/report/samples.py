"""Made-up results: small ones with every hard case in them, and large ones that look like a real comparison."""

from __future__ import annotations

import json
import sys
from math import exp, log, nan
from pathlib import Path
from random import Random
from typing import Any

from anysize.report.schema import (
    Arm,
    Kept,
    Metric,
    PlanRecord,
    Reached,
    Results,
    Row,
    Run,
    SourceRecord,
)

HOSTILE = "<script>window.hurt=1</script>\"'><img src=x onerror=hurt=1> $\\frac{1}$ {{7*7}} %{y} </script> `|` \x00"
RATES = (0.001, 0.002, 0.004, 0.008)
# What an arm starts from, what it tends to, how fast, and its best rate.
SHAPES = {
    "random": (7.63, 4.45, 3.2, 0.008),
    "subcloning": (6.08, 4.13, 2.6, 0.004),
    "weight-selection": (6.47, 4.20, 2.7, 0.004),
    "subspace": (4.55, 4.08, 2.2, 0.004),
    "subspace + distillation": (4.55, 4.02, 2.0, 0.002),
}


def plan(random: Random, *, layers: int = 4, directions: bool = False) -> PlanRecord:
    """A plan that keeps half of everything."""
    kept = [
        Kept(axis=axis, source_size=size, rows={f"layer {i}": half(random, size) for i in range(layers)})
        for axis, size in (("ffn", 344), ("kv", 4), ("group", 2))
    ]
    turned = tuple(spread(random, 64) for _ in range(32)) if directions else ()
    if not directions:
        kept.insert(0, Kept(axis="hidden", source_size=128, rows={"all": half(random, 128)}))
    rows = (
        ("model.embed_tokens.weight", "vocab -> hidden", "2048 x 128", "2048 x 64", "turned", 1),
        ("model.layers.{layer}.mlp.up_proj.weight", "norm(hidden) -> ffn", "344 x 128", "172 x 64", "fitted", layers),
    )
    return PlanRecord(
        tensors=rows,
        exact=False,
        notes=("the tied head's gain was fitted",),
        layers=tuple(half(random, layers)),
        num_source_layers=layers,
        kept=tuple(kept),
        directions=turned,
    )


def half(random: Random, size: int) -> tuple[int, ...]:
    return tuple(sorted(random.sample(range(size), max(1, size // 2))))


def spread(random: Random, size: int) -> tuple[float, ...]:
    parts = [random.random() ** 6 for _ in range(size)]
    return tuple(part / sum(parts) for part in parts)


def _loss(name: str, rate: float, step: int, seed: int, random: Random) -> float:
    start, end, slope, best = SHAPES[name]
    off = 0.05 * abs(log(rate / best)) ** 1.5
    down = exp(-slope * (step / 800) ** 0.55) if step else 1.0
    floor = exp(-slope)
    return end + off * (step > 0) + (start - end) * (down - floor) / (1 - floor) + random.gauss(0, 0.004) + 0.003 * seed


def _run(name: str, rate: float, seed: int, steps: int, *, status: Any = "finished") -> Run:
    random = Random(f"{name} {rate} {seed}")
    last = steps if status == "finished" else steps // 4
    at = [0, *(round(steps ** (i / 29)) for i in range(30))]
    at = sorted({step for step in at if step <= last})
    test = [_loss(name, rate, step, seed, random) for step in at]
    if status == "diverged":
        test[-1] = nan
    return Run(
        arm=name,
        seed=seed,
        learning_rate=rate,
        status=status,
        steps=last if status == "trial" else steps,
        at=tuple(at),
        validation=tuple(value - 0.05 for value in test),
        test=tuple(test),
        train_s=110.0 * last / steps * (1.5 if "distillation" in name else 1),
        teacher_s=35.0 * last / steps if "distillation" in name else 0.0,
    )


def _reached(values: dict[int, float], goal: float, arm: Arm, other_s: float, steps: int) -> Reached | None:
    there = next((step for step, value in values.items() if value <= goal), None)
    if there is None:
        return None
    seconds = arm.calibration_s + arm.conversion_s + 110 * there / steps
    return Reached(
        steps=there,
        tokens=there * 2048,
        flops=there * 2048 * (arm.flops_a_token + arm.teacher_flops_a_token),
        seconds=seconds,
        steps_share=there / steps,
        flops_share=there / steps * (1 + arm.teacher_flops_a_token / arm.flops_a_token),
        seconds_share=seconds / other_s,
        flops_share_with_source=1.9 + there / steps,
        seconds_share_with_source=(1363 + seconds) / other_s,
    )


def _row(name: str, runs: list[Run], arms: dict[str, Arm], goals: dict[str, float], steps: int) -> Row:
    rate = SHAPES[name][3]
    ended = [run for run in runs if run.arm == name and run.learning_rate == rate and run.status == "finished"]
    after = sorted(run.test[-1] for run in ended)
    middle = next(run for run in ended if run.test[-1] == after[len(after) // 2])
    values = dict(zip(middle.at, middle.test, strict=True))
    return Row(
        arm=name,
        learning_rate=rate,
        num_seeds=len(ended),
        num_diverged=sum(run.arm == name and run.status == "diverged" for run in runs),
        before=middle.test[0],
        after=middle.test[-1],
        after_of_seeds=tuple(run.test[-1] for run in ended),
        rise=max(0.0, max(middle.test) - middle.test[0]),
        train_s=110.0,
        reached={goal: _reached(values, loss, arms[name], 110, steps) for goal, loss in goals.items() if goal != name},
    )


def looking_real(*, seeds: int = 3, steps: int = 800) -> Results:
    """Five arms, three seeds, four rates: one rate of each only tried, the highest of one diverged."""
    arms: dict[str, Arm] = {}
    runs: list[Run] = []
    for name, (_, _, _, best) in SHAPES.items():
        made, taught = name != "random", "distillation" in name
        arms[name] = Arm(
            name=name,
            start="random weights" if not made else f"half the width, chosen by {name}",
            command=f"anysize resize demo-output/source out/{name.split()[0]} --scale 0.5" if made else "",
            num_parameters=857_216,
            sizes={"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4},
            settings={"weight_decay": 0.1, "distillation": 0.5 if taught else 0},
            calibration_s=11.1 if made and name != "weight-selection" else 0,
            conversion_s=8.3 if "subspace" in name else 0.6 if made else 0.01,
            flops_a_token=5.1e6,
            teacher_flops_a_token=5.6e6 if taught else 0,
            plan=plan(Random(name), directions="subspace" in name) if made else None,
        )
        for rate in RATES:
            status = "trial" if rate == 0.001 else "diverged" if rate == 0.008 and best < 0.004 else "finished"
            runs += [_run(name, rate, seed, steps, status=status) for seed in range(seeds if rate == best else 1)]
    last = {
        goal: sorted(r.test[-1] for r in runs if r.arm == goal and r.learning_rate == SHAPES[goal][3])[seeds // 2]
        for goal in ("random", "subcloning")
    }
    return Results(
        title="A small Llama at half its width",
        complete=True,
        modality="text",
        metric=Metric(name="loss", unit="nats/token", bits_per_byte=0.4271),
        date="2026-11-21",
        machine={"processor": "x86_64", "num_cores": 2, "memory_bytes": 25274793984, "gpu": None},
        versions={"anysize": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"},
        command="anysize compare compare.yaml -o out/compare",
        config="source: demo-output/source\nseeds: [0, 1, 2]\nlearning_rates: [0.001, 0.002, 0.004, 0.008]\n",
        source=SourceRecord(
            location="demo-output/source",
            num_parameters=1_820_352,
            sizes={"hidden_size": 128},
            test=3.995,
            train_s=1363.8,
            train_flops=4.2e13,
            train_tokens=4_096_000,
        ),
        steps=steps,
        tokens_a_step=2048,
        learning_rates=RATES,
        seeds=tuple(range(seeds)),
        goals=("random", "subcloning"),
        notes=("Test books are other books than validation books.",),
        arms=tuple(arms.values()),
        runs=tuple(runs),
        rows=tuple(_row(name, runs, arms, last, steps) for name in SHAPES),
    )


def small(*names: str, goal: str | None = "random", after: dict[str, float] | None = None, **changes: Any) -> Results:
    """Arms of four points and one rate; `after` says where they end, and an arm that ends lower reaches the goal."""
    names = names or ("random", "ours")
    ends = {name: 4.0 - 0.5 * i for i, name in enumerate(names)} | (after or {})
    arms = tuple(
        Arm(name=n, start="s", command="c", num_parameters=9, sizes={}, settings={}, flops_a_token=1.0) for n in names
    )
    runs = tuple(
        Run(arm=n, seed=0, learning_rate=0.01, status="finished", steps=90, at=(0, 10, 30, 90),
            validation=(7.0, 6.0, 5.0, ends[n]), test=(7.5, 6.5, 5.5, ends[n]), train_s=9.0)
        for n in names
    )  # fmt: skip
    rows = tuple(
        Row(arm=n, learning_rate=0.01, num_seeds=1, num_diverged=0, before=7.5, after=ends[n], rise=0.0, train_s=9.0,
            after_of_seeds=(ends[n],),
            reached={goal: reached(10, 90) if ends[n] <= ends[goal] else None} if goal not in (None, n) else {})
        for n in names
    )  # fmt: skip
    filled: dict[str, Any] = {
        "title": "small", "complete": True, "modality": "text", "metric": Metric(name="loss", unit="nats/token"),
        "date": "2026-11-21", "machine": {}, "versions": {}, "command": "anysize compare",
        "config": "seeds: [0]",
        "source": None, "steps": 90, "tokens_a_step": 64, "learning_rates": (0.01,), "seeds": (0,),
        "goals": (goal,) if goal else (), "arms": arms, "runs": runs, "rows": rows,
    }  # fmt: skip
    return Results(**(filled | changes))


def reached(steps: int, whole: int, *, seconds_share: float | None = None) -> Reached:
    """What it takes to come to a goal after so many steps of so many."""
    share = steps / whole
    return Reached(
        steps=steps,
        tokens=steps * 64,
        flops=steps * 64.0,
        seconds=steps * 0.1,
        steps_share=share,
        flops_share=share,
        seconds_share=share if seconds_share is None else seconds_share,
    )


if __name__ == "__main__":
    looking_real().save(Path(sys.argv[1]))
    print(json.dumps({"wrote": sys.argv[1]}))
