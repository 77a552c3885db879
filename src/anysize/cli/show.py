"""Print plans, proofs and inspections: rich tables on a terminal, plain lines where the output is piped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from anysize.cli.progress import size_of
from anysize.inspection import Inspection
from anysize.proof.verdict import Check, Verification
from anysize.recipe import Plan
from anysize.report.plans import plan_rows

if TYPE_CHECKING:
    from anysize.calibration.scores import Scores


@cache
def console() -> Console:
    """Return the console for results (standard output)."""
    return Console(soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: of rich on a terminal, in plain columns elsewhere."""
    if console().is_terminal:
        table = Table(title=title, title_justify="left", header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(markup=False, emoji=False, highlight=False).print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    print(title)
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def say(line: str) -> None:
    """Print one line of the result."""
    console().print(line)


def show_plan(plan: Plan, *, as_json: bool) -> None:
    """Print a plan: every kind of tensor with its arrow, shapes and operator, then sizes, bytes and exactness."""
    if as_json:
        print(json.dumps(plan.model_dump(mode="json")))
        return
    exact = "yes" if plan.exact else "no"
    rows = [[*words, str(count), exact] for *words, count in plan_rows(plan)]
    title = f"{plan.source.location} ({plan.model_type}) with preset {plan.preset}, seed {plan.seed}"
    print_table(title, ["tensor", "reads -> writes", "source", "target", "how", "count", "exact?"], rows)
    out = console()
    growth = plan.num_parameters / max(1, plan.source_num_parameters)
    out.print(
        f"{plan.source_num_parameters:,} -> {plan.num_parameters:,} parameters (x {growth:.2f}), "
        f"{size_of(plan.source_num_bytes)} -> {size_of(plan.num_bytes)}, "
        f"peak memory about {size_of(plan.peak_bytes)} beside the interpreter",
    )
    for reason in plan.inexact:
        out.print(f"not exact: {reason}")
    for note in plan.notes:
        out.print(f"note: {note}")
    if plan.exact:
        out.print("exact: the target computes the same function as the source")


def _verdict(check: Check) -> str:
    if check.passed:
        return "pass"
    return "FAIL" if check.required else "differs"


def json_of(proof: Verification, **beside: object) -> str:
    """Return a proof with its verdict, and whatever else belongs to it, as one JSON object; NaN becomes null."""
    told = {"passed": proof.passed, "failures": proof.failures, "proof": json.loads(proof.model_dump_json())}
    return json.dumps(told | beside)


def show_proof(proof: Verification) -> None:
    """Print a proof: each figure with its tolerance, and beside it what a wrong answer measured."""
    rows = [
        [
            check.name,
            check.what,
            f"{check.measured:.2g}",
            f"{check.tolerance:.2g}",
            "" if check.control is None else f"{check.control:.2g}",
            check.unit,
            _verdict(check),
        ]
        for check in proof.checks
    ]
    print_table("proof", ["check", "what", "measured", "allowed", "wrong answer", "unit", "verdict"], rows)
    for note in proof.notes:
        console().print(f"note: {note}")
    console().print("all proofs passed" if proof.passed else "NOT the same: " + "; ".join(proof.failures))


def show_inspection(found: Inspection, *, as_json: bool) -> None:
    """Print what a checkpoint holds."""
    if as_json:
        print(found.model_dump_json())
        return
    rows = [[name, f"{size:,}"] for name, size in found.sizes.items()]
    rows += [
        ["parameters", f"{found.num_parameters:,}"],
        ["bytes", size_of(found.num_bytes)],
        ["tensors", f"{found.num_tensors} in {found.num_files} file(s)"],
        ["storage", ", ".join(f"{dtype} x {count}" for dtype, count in found.dtypes.items())],
        ["tied head", "yes" if found.tied else "no"],
    ]
    rows += [[f"ignored {name}", reason] for name, reason in found.dropped.items()]
    if found.made_by:
        rows.append(["made by", found.made_by])
        rows.append(["exact", "yes" if found.exact else "no"])
    print_table(f"{found.location}: {found.model_class}", ["what", "value"], rows)


def show_scores(scores: Scores, path: Path, *, as_json: bool) -> None:
    """Print what a calibration found: how much was read, and the scores of the layers."""
    record, blocks = scores.record, {kind: values for kind, values in scores.blocks.items() if values.dim() == 1}
    if as_json:
        told = {"output": str(path), "scores_sha256": scores.sha256, "num_bytes": path.stat().st_size}
        layers = {kind: values.tolist() for kind, values in scores.blocks.items()}
        print(json.dumps(record.model_dump() | told | {"layers": layers}))
        return
    rows = [
        [str(layer), *(f"{float(v):.4f}" for v in values)]
        for layer, values in enumerate(zip(*blocks.values(), strict=True))
    ]
    print_table("layers: low scores can go", ["layer", *blocks], rows)
    unit = "images" if record.sequence_length == 0 else "tokens"
    size = size_of(path.stat().st_size)
    say(f"made {path}: {record.tokens:,} {unit} of {record.data}, {len(scores.sites)} sites, {size}")
