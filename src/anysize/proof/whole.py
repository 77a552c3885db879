"""The whole-model comparison: load source and target as stock models and run the parity checks on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anysize.config import understand
from anysize.errors import CheckpointError
from anysize.io.dtypes import TORCH
from anysize.io.hub import open_source
from anysize.io.models import build_model
from anysize.io.provenance import RECORD, read_record
from anysize.io.reader import Checkpoint, TensorSource, read_bytes, read_header
from anysize.io.whole import scratch_folder
from anysize.memory import fits_in_memory
from anysize.proof.algebra import check_rows, rows_of
from anysize.proof.coverage import check_source, check_written
from anysize.proof.origin import WEIGHTS, changes_since
from anysize.proof.parity import Comparison, load
from anysize.proof.tokens import speak_target_ids
from anysize.proof.verdict import Verification
from anysize.proof.written import check_digests
from anysize.recipe import Plan
from anysize.tensors import num_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT32_BYTES = 4


def _coarsest(dtypes: Iterable[str]) -> torch.dtype:
    """Return the storage type that rounds most: it decides what may be asked of the comparison."""
    return TORCH[max(dtypes, key=["F64", "F32", "F16", "BF16"].index)]


def _stored(plan: Plan) -> torch.dtype:
    """Return the same of what a plan reads and writes: what it drops may be of any type, such as a mask."""
    return _coarsest({dtype for recipe in plan.recipes for dtype in (recipe.source_dtype, recipe.dtype)})


def compare_made(plan: Plan, tensors: TensorSource, made: dict[str, torch.Tensor], *, full: bool) -> Verification:
    """Compare tensors just made in memory with their source; without `full`, only where both fit with ease."""
    if not full and not fits_in_memory(plan.num_parameters + plan.source_num_parameters):
        return Verification(checks=(), notes=("whole models not compared: they do not fit beside one another",))
    target = build_model(plan.model_class, plan.target_config, dict(made), torch.float32)
    return _planned(plan, _source_model(tensors, plan.model_class), target, _stored(plan)).run(full=full)


def _planned(plan: Plan, source: PreTrainedModel, target: PreTrainedModel, stored: torch.dtype) -> Comparison:
    """Return the comparison of a source with what a plan made of it, in the target's token ids."""
    if plan.kept_tokens is None:
        return Comparison(source, target, stored, exact=plan.keeps_logits)
    spoken = speak_target_ids(source, plan)
    return Comparison(spoken, target, stored, exact=plan.keeps_logits, num_tokens=plan.kept_tokens.target_size)


def compare_written(plan: Plan, tensors: TensorSource, folder: Path, *, full: bool) -> Verification:
    """Compare the model just written (weights in `folder`, config in the plan) with its source.

    Models that do not fit in a quarter of the free memory are compared layer by layer when `full`, and otherwise left
    to the other proofs, which is said in a note.
    """
    total = plan.num_parameters + plan.source_num_parameters
    if fits_in_memory(total):
        target = build_model(plan.model_class, plan.target_config, _read_all(folder), torch.float32)
        return _planned(plan, _source_model(tensors, plan.model_class), target, _stored(plan)).run(full=full)
    if full and isinstance(tensors, Checkpoint):
        return _streamed(plan, tensors, folder)
    return _not_compared(total)


def _not_compared(num_parameters: int) -> Verification:
    taken = num_parameters * _FLOAT32_BYTES
    note = f"whole models not compared: {taken:,} bytes exceed a quarter of the free memory"
    return Verification(checks=(), notes=(note,))


def _read_all(folder: Path) -> dict[str, torch.Tensor]:
    headers = [read_header(path) for path in folder.glob("*.safetensors")]
    return {name: read_bytes(info) for header in headers for name, info in header.items()}


def _on_disk(folders: Sequence[Path], class_names: Sequence[str], scratch: Path) -> list[PreTrainedModel]:
    """Return models whose weights stay on disk, each with a place of its own for what is converted on loading."""
    places = [scratch / str(number) for number in range(len(folders))]
    for place in places:
        place.mkdir()
    return [load(folder, name, scratch=place) for folder, name, place in zip(folders, class_names, places, strict=True)]


def _streamed(plan: Plan, source: Checkpoint, folder: Path) -> Verification:
    """Compare layer by layer. The unfinished output is looked at through links, so that it never looks complete."""
    with scratch_folder() as place:
        view = place / "target"
        view.mkdir()
        for path in folder.glob("model*.safetensors*"):
            (view / path.name).symlink_to(path)
        (view / "config.json").write_text(json.dumps(plan.target_config), encoding="utf-8")
        models = _on_disk([source.folder, view], [plan.model_class] * 2, place)
        return _planned(plan, models[0], models[1], _stored(plan)).run_streamed()


def _source_model(tensors: TensorSource, class_name: str) -> PreTrainedModel:
    if isinstance(tensors, Checkpoint):
        return load(tensors.folder, class_name)
    return build_model(class_name, tensors.config, {n: tensors.read(n) for n in tensors.tensors}, torch.float32)


def _plan_beside(tensors: TensorSource) -> Plan | None:
    record = read_record(tensors.folder) if isinstance(tensors, Checkpoint) else None
    if record is None:
        return None
    return Plan.from_json(json.dumps(record["plan"]), origin=f"{tensors.location}/{RECORD}")


def _made_from(plan: Plan, source: TensorSource) -> bool:
    """Whether a plan was made for a model; raise CheckpointError for one that differs in its weights alone."""
    changed = changes_since(plan.source, source)
    if changed == [WEIGHTS]:
        raise CheckpointError(
            f"'{source.location}' is not the source that the plan of the target was made for: its weights changed; put "
            "back those it was made for, or plan again"
        )
    return not changed


def _against_plan(plan: Plan, source: TensorSource, target: Checkpoint, *, made_from: bool) -> Verification:
    """Hold the files of a target against the plan beside them, if it was made for this source."""
    if not made_from:
        return Verification(checks=(), notes=("the target was made from another source: its plan is not checked",))
    if plan.dense_sha256:
        known = (read_record(target.folder) or {}).get("rows")
        if not known:
            return Verification(
                checks=(check_written(plan, target.folder),),
                notes=("neither its matrices nor digests of its rows lie in the folder: rows are not checked",),
            )
        return Verification(
            checks=(check_written(plan, target.folder), check_digests(plan, rows_of(target), known)),
            notes=("its matrices are not in the folder: rows are held against what was written, not the source",),
        )
    rows = check_rows(plan, rows_of(source), rows_of(target))
    return Verification(checks=(check_written(plan, target.folder), rows))


def compare(source: str | Path | PreTrainedModel, target: str | Path | PreTrainedModel, *, full: bool) -> Verification:
    """Compare any two models of one family that read the same inputs; see `anysize.verify`."""
    opened = [open_source(model) for model in (source, target)]
    configs = [understand(tensors.config) for tensors in opened]
    if configs[0].architecture.model_type != configs[1].architecture.model_type:
        raise CheckpointError(
            f"cannot compare a {configs[0].architecture.model_type} with a {configs[1].architecture.model_type}: "
            "their inputs and outputs have nothing in common"
        )
    dropped = [check_source(config, tensors)[1] for tensors, config in zip(opened, configs, strict=True)]
    plan = _plan_beside(opened[1])
    proof = Verification(checks=())
    made_from = plan is not None and _made_from(plan, opened[0])
    if plan is not None and isinstance(opened[1], Checkpoint):
        proof = _against_plan(plan, opened[0], opened[1], made_from=made_from)
    if plan is not None and plan.kept_tokens is not None and not made_from:
        plan = None
    tokens = [config.sizes.get("vocab", 0) for config in configs]
    if tokens[1] < tokens[0] and (plan is None or plan.kept_tokens is None):
        raise CheckpointError(
            f"'{opened[1].location}' has {tokens[1]} tokens and '{opened[0].location}' {tokens[0]}, and no plan of "
            "anysize beside it says which are which: their logits cannot be compared"
        )
    stored = _coarsest(
        info.dtype for tensors, without in zip(opened, dropped, strict=True)
        for name, info in tensors.tensors.items() if name not in without
    )  # fmt: skip

    def comparison(models: Sequence[PreTrainedModel]) -> Comparison:
        if plan is None:
            return Comparison(models[0], models[1], stored)
        return _planned(plan, models[0], models[1], stored)

    total = sum(map(num_parameters, configs))
    classes = [config.model_class for config in configs]
    folders = [tensors.folder for tensors in opened if isinstance(tensors, Checkpoint)]
    # What is in memory already is compared there.
    if fits_in_memory(total) or len(folders) < len(opened):
        return proof + comparison([_source_model(t, name) for t, name in zip(opened, classes, strict=True)]).run(
            full=full
        )
    with scratch_folder() as place:
        return proof + comparison(_on_disk(folders, classes, place)).run_streamed()
