"""Print what an evaluation measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anysize.cli.show import print_table, say

if TYPE_CHECKING:
    from anysize.evals.drafting import Drafting
    from anysize.evals.evaluation import Evaluation, ImageFigures, TaskScore, TextFigures


def _task_rows(score: TaskScore, indent: str = "") -> list[list[str]]:
    """Return a line for every metric of a task, then those of its parts."""
    rows: list[list[str]] = []
    for name, value in score.metrics.items():
        error = score.standard_errors.get(name)
        told = f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
        rows.append([f"{indent}{score.task}", name, told, f"{score.num_examples:,}"])
    return rows + [row for part in score.parts for row in _task_rows(part, indent + "  ")]


def _figure_rows(unit: str, figures: TextFigures | ImageFigures) -> list[list[str]]:
    """Return (what, the model's, the source's) of everything that is measured per token or image."""
    ours, theirs = figures.model_dump(), figures.source.model_dump() if figures.source else {}
    named = {
        f"loss_nats_per_{unit}": f"loss, nats/{unit}",
        "bits_per_byte": "loss, bits/byte",
        "top1_accuracy": "top-1 accuracy",
    }
    rows = [
        [what, f"{ours[name]:.4f}", f"{theirs[name]:.4f}" if name in theirs else ""]
        for name, what in named.items()
        if name in ours
    ]
    if theirs:
        rows.append([f"KL(source || model), nats/{unit}", f"{theirs[f'kl_nats_per_{unit}']:.4g}", ""])
        rows.append(["top-1 agreement with the source", f"{theirs['top1_agreement']:.4f}", ""])
    return rows


def show_evaluation(found: Evaluation, *, as_json: bool) -> None:
    """Print what an evaluation found, the source's figures beside the model's."""
    if as_json:
        print(found.model_dump_json())
        return
    say(f"{found.model}: {found.model_type}, {found.num_parameters:,} parameters, {found.dtype} on {found.device}")
    if (text := found.text) is not None:
        read = f"{text.num_tokens:,} tokens ({text.num_bytes:,} bytes) of {found.data}"
        title = f"{read}, windows of {text.sequence_length}"
        print_table(title, ["what", "model", text.source.source if text.source else ""], _figure_rows("token", text))
        if text.num_unknown_tokens:
            say(f"note: {text.num_unknown_tokens:,} of the tokens are unknown ones, whose bits do not tell their text")
    if (images := found.images) is not None:
        title = f"{images.num_images:,} images of {found.data}"
        print_table(
            title, ["what", "model", images.source.source if images.source else ""], _figure_rows("image", images)
        )
    if found.tasks:
        rows = [row for score in found.tasks for row in _task_rows(score)]
        print_table("tasks", ["task", "metric", "value", "examples"], rows)


def show_drafting(
    trained: Mapping[str, Any], found: Drafting, output: Path, *, num_prompts: int, as_json: bool
) -> None:
    """Print what a draft model is worth to its source; num_prompts: that were asked for."""
    if as_json:
        print(json.dumps({"output": str(output), "drafting": found.model_dump(), "training": dict(trained)}))
        return
    rows = [
        ["taken, share of the proposed tokens", f"{found.acceptance_rate:.3f}"],
        [f"tokens for each check of {found.num_drafted}", f"{found.tokens_a_check:.2f}"],
        ["agreement with the source, share of all tokens", f"{found.agreement:.3f}"],
        ["source alone", f"{found.source_s:.2f} s"],
        ["source with draft", f"{found.pair_s:.2f} s"],
        ["speed-up", f"{found.speedup:.2f}x"],
        ["same text", "yes" if found.same_text else "NO"],
    ]
    print_table(f"{found.num_tokens:,} tokens after {found.num_prompts} prompts", ["what", "value"], rows)
    if found.num_prompts < num_prompts:
        say(f"note: the held-out text gave {found.num_prompts:,} prompts of the {num_prompts:,} asked for")
    say(f"made {output}: generate(assistant_model=...) takes it")
