"""Print what training and comparisons came to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.cli.progress import size_of
from anysize.cli.show import print_table, say
from anysize.flops import flops_a_second
from anysize.report.curves import missing

if TYPE_CHECKING:
    from anysize.report.schema import Reached, Results


def show_foreseen(found: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a run would train, and what it would take on every device."""
    if as_json:
        print(json.dumps(found))
        return
    sizes = ", ".join(f"{name} {size}" for name, size in found["sizes"].items())
    say(f"{found['num_parameters']:,} parameters: {sizes}")
    say(f"{found['tokens_a_step_each']:,} {found['unit']} a step on each device")
    kinds = ("states", "teacher", "activations", "logits", "total")
    rows = [[name, *(size_of(taken[kind]) for kind in kinds)] for name, taken in found["memory_bytes"].items()]
    print_table("memory of a device (activations are an estimate)", ["devices", *kinds], rows)


def show_training(found: Mapping[str, Any], output: str, *, as_json: bool) -> None:
    """Print what a training run came to: held-out figures over its steps, tokens a second, and where it lies."""
    if as_json:
        print(json.dumps({"output": output, **found}))
        return
    curve: dict[str, dict[str, float]] = found["curve"]
    unit = found.get("unit", "tokens")
    splits = list(next(iter(curve.values()), {}))
    if curve:
        rows = [[step, *(f"{losses[split]:.4f}" for split in splits)] for step, losses in curve.items()]
        print_table(f"held-out {'error rate' if unit == 'images' else 'loss'}", ["step", *splits], rows)
    if bits := found.get("bits_per_byte"):
        say(f"in the end {', '.join(f'{value:.4f} bits/byte of {split}' for split, value in bits.items())}")
    for note in found.get("notes", ()):
        say(f"note: {note}")
    rate = found["tokens"] / max(found["train_s"], 1e-9)
    seconds = found.get("seconds", "")
    amount = f"{found['tokens']:,} {unit}, {rate:,.0f} a second {seconds} in training"
    say(f"made {output}: {found['steps']:,} steps, {amount}{_speed(found)}")


def _speed(found: Mapping[str, Any]) -> str:
    """Say what an accelerator did in the median step; nothing of a processor, which nobody holds against its peak."""
    device, speed, share = (found.get(name) for name in ("device", "flops_per_s", "utilization"))
    if not device or speed is None:
        return ""
    peak = f" ({share:.1%} of the dense bfloat16 peak of {device})" if share else f" on {device}"
    return f", {flops_a_second(speed)}{peak}"


def _share(reached: Reached | None) -> str:
    return "not reached" if reached is None else f"{reached.steps_share:.3f}"


def show_comparison(results: Results, path: Path, *, as_json: bool) -> None:
    """Print what every arm came to, and what it needs to come as far as each goal."""
    if as_json:
        print(results.model_dump_json())
        return
    rows = [
        [
            row.arm, f"{row.learning_rate:g}", f"{row.before:.4f}", f"{row.after:.4f}",
            *("1" if row.arm == goal else _share(row.reached.get(goal)) for goal in results.goals),
            *("1" if row.arm == goal else "" if (r := row.reached.get(goal)) is None else f"{r.seconds_share:.3f}"
              for goal in results.goals),
        ]
        for row in results.rows
    ]  # fmt: skip
    rows += [[name, "", "", "no finished run"] + [""] * (2 * len(results.goals)) for name in missing(results)]
    columns = ["arm", "rate", "before", "after", *(f"steps to {goal}'s" for goal in results.goals),
               *(f"seconds to {goal}'s" for goal in results.goals)]  # fmt: skip
    measured = f"{results.metric.name} in {results.metric.unit}, medians of {len(results.seeds)} seeds"
    print_table(f"{results.title}: {measured}", columns, rows)
    for note in results.notes:
        say(f"note: {note}")
    say(f"made {path}; `anysize report {path.parent}` draws it")
