"""What results say of plans, machines and commands."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from anysize.axis import NEW
from anysize.config import understand
from anysize.recipe import Plan
from anysize.report.plans import plan_rows
from anysize.report.schema import Kept, PlanRecord
from anysize.training.clock import peak_of, seconds_of
from anysize.training.config import Resize
from anysize.training.stream import stream_writer

_MOST = 64


def _kept(plan: Plan) -> tuple[Kept, ...]:
    """Return what was kept of every axis that was cut by choosing coordinates."""
    rows: dict[str, dict[str, tuple[int, ...]]] = {}
    sizes: dict[str, int] = {}
    turned = any(recipe.writer for recipe in plan.recipes)
    for name, axis_map in plan.axes.items():
        axis, _, where = name.partition(".")
        if axis_map.target_size >= axis_map.source_size or axis == "vocab" or (axis == "hidden" and turned):
            continue
        row = f"layer {where.replace('.', ', expert ')}" if where else "all layers"
        rows.setdefault(axis, {})[row] = tuple(int(i) for i in axis_map.index if i != NEW)
        sizes[axis] = axis_map.source_size
    # The map for all layers is a stand-in where each has its own.
    return tuple(
        Kept(axis=axis, source_size=sizes[axis],
             rows={k: v for k, v in found.items() if k != "all layers" or len(found) == 1})
        for axis, found in rows.items()
    )  # fmt: skip


def _directions(plan: Plan) -> tuple[tuple[float, ...], ...]:
    """Return how much of each source coordinate the kept directions draw on, pooled to at most 64 x 64."""
    if not any(recipe.writer for recipe in plan.recipes):
        return ()
    energy = stream_writer(plan).square()
    pooled = torch.nn.functional.adaptive_avg_pool2d(
        energy[None, None], (min(_MOST, energy.shape[0]), min(_MOST, energy.shape[1]))
    )[0, 0]
    return tuple(tuple(round(float(v), 6) for v in row / row.sum()) for row in pooled)


def plan_record(plan: Plan) -> PlanRecord:
    """Return a plan as a reader of results wants to see it."""
    return PlanRecord(
        tensors=tuple(plan_rows(plan)), exact=plan.exact, notes=(*plan.inexact, *plan.notes),
        layers=tuple(step.source for step in plan.layers),
        num_source_layers=understand(plan.source_config).sizes["layer"],
        kept=_kept(plan), directions=_directions(plan),
    )  # fmt: skip


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a comparison runs on, and which seconds it counts."""
    import psutil  # noqa: PLC0415

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    peak = peak_of(device)[1]
    return {"num_cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total, "gpus": gpus,
            "system": platform.system(), "seconds": seconds_of(device),
            **({"peak_flops_per_s": peak} if peak else {})}  # fmt: skip


def versions() -> dict[str, str]:
    """Return the versions that a figure may depend on."""
    names = ("anysize", "torch", "transformers", "accelerate", "numpy")
    return {**{name: version(name) for name in names}, "python": platform.python_version()}


def resize_command(resize: Resize, calibration: Sequence[str]) -> str:
    """Return the command that makes the same start by hand, after that of a calibration where there is one."""
    words = ["anysize", "resize", resize.source, "OUTPUT"]
    for name, value in resize.model_dump(exclude_defaults=True, exclude={"source"}).items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    if not calibration:
        return shlex.join(words)
    return f"{shlex.join(calibration)} && {shlex.join([*words, '--calibration', 'scores.safetensors'])}"
