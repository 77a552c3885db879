"""From a plan to a model: proofs before anything is made, the tensors, proofs of what was made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from anysize.errors import CheckpointError, InputError, OutputError, ProofError, joined
from anysize.io.hub import open_source
from anysize.io.reader import Checkpoint, TensorSource
from anysize.progress import Progress
from anysize.recipe import Plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anysize.io.writer import CheckpointWriter
    from anysize.proof.verdict import Verification

VerifyMode = Literal["auto", "full", "off"]

"""Called as progress(stage, done, total); stages are "tokens" (read so far), "calibrate" and "search" (in tokens),
"leave one out", "fit" (in layers), "proof", "write" (in bytes), "verify"."""


def _same_source(plan: Plan, tensors: TensorSource) -> None:
    from anysize.proof.origin import changes_since  # noqa: PLC0415

    changed = changes_since(plan.source, tensors)
    if plan.kept_tokens is not None:
        from anysize.vocabulary.keep import tokenizer_sha256  # noqa: PLC0415

        if tokenizer_sha256(tensors) != plan.tokenizer_sha256:
            changed.append("tokenizer")
    if changed:
        raise CheckpointError(
            f"'{tensors.location}' is not the source this plan was made for: its {joined(changed)} changed; plan again"
        )


def _require(proof: Verification, what: str) -> None:
    if not proof.passed:
        raise ProofError(f"{what} failed, and nothing was kept: {joined(proof.failures)}")


def _fingerprint(plan: Plan, tensors: TensorSource, *, allow_nonfinite: bool) -> str:
    # What was let through is not taken up by a run that would have refused it.
    return hashlib.sha256(f"{plan.to_json()}{tensors.identity}{allow_nonfinite}".encode()).hexdigest()


def carry_out(
    plan: Plan,
    output: str | Path | None,
    source: str | Path | PreTrainedModel | None,
    verify: VerifyMode,
    max_shard_size: str,
    overwrite: bool,
    allow_nonfinite: bool,
    command: str,
    progress: Progress,
) -> tuple[PreTrainedModel | Path, Verification]:
    """Return what `anysize.apply` returns, and the proof; raise as it does."""
    from anysize.io import provenance, writer  # noqa: PLC0415
    from anysize.proof import coverage, replan  # noqa: PLC0415
    from anysize.proof.algebra import rows_from_files, rows_of  # noqa: PLC0415
    from anysize.proof.miniature import prove_on_miniature  # noqa: PLC0415
    from anysize.proof.written import digests_of  # noqa: PLC0415

    if verify not in get_args(VerifyMode):
        raise InputError(f"verify '{verify}' is unknown: wanted {', '.join(get_args(VerifyMode))}")
    tensors = open_source(plan.source.location if source is None else source)
    _same_source(plan, tensors)
    path = None if output is None else Path(output).expanduser()
    max_shard_bytes = writer.parse_bytes(max_shard_size)
    if path is not None:
        _check_places(tensors, path)
        writer.check_output(path, plan.num_bytes, overwrite=overwrite)
    coverage.account(plan, tensors)
    replan.require_unedited(plan, tensors)
    coverage.check_tied_copies(plan, tensors, rows_of(tensors))
    progress("proof", 0, 1)
    proof = prove_on_miniature(plan)
    progress("proof", 1, 1)
    _require(proof, "the miniature proof")
    if plan.kept_tokens is not None:
        from anysize.proof.tokens import prove_tokenizer  # noqa: PLC0415

        proof += prove_tokenizer(plan, tensors)
        _require(proof, "the proof of the tokenizer")
    if path is None:
        model, more = _in_memory(plan, tensors, verify, allow_nonfinite=allow_nonfinite)
        return model, proof + more
    fingerprint = _fingerprint(plan, tensors, allow_nonfinite=allow_nonfinite)
    with writer.CheckpointWriter(path, plan.recipes, fingerprint, max_shard_bytes) as made:
        proof += _to_disk(plan, tensors, made, verify, allow_nonfinite, progress)
        digests = digests_of(plan, rows_from_files(made.places))
        for name, data in provenance.files_beside(plan, tensors, proof, command, digests):
            made.add(name, data)
        made.finish()
    return path, proof


def require_output(source: str | Path | PreTrainedModel, output: Path, *, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before anything is planned, which may take long."""
    from anysize.io import writer  # noqa: PLC0415

    _check_places(open_source(source), output)
    writer.check_output(output, 0, overwrite=overwrite)


def _check_places(tensors: TensorSource, output: Path) -> None:
    if isinstance(tensors, Checkpoint):
        home, there = tensors.folder.resolve(), output.resolve()
        if there == home or there in home.parents or home in there.parents:
            raise OutputError(
                f"the output '{output}' and the source '{tensors.folder}' lie in one another: choose another output"
            )
    here = Path.cwd()
    if output.resolve() in (here, *here.parents):
        raise OutputError(f"the output '{output}' is the current folder or holds it: name a folder of its own")


def _in_memory(
    plan: Plan, tensors: TensorSource, verify: VerifyMode, *, allow_nonfinite: bool
) -> tuple[PreTrainedModel, Verification]:
    from anysize.executor import target_tensors  # noqa: PLC0415
    from anysize.io.dtypes import TORCH  # noqa: PLC0415
    from anysize.io.models import NamedTensors, build_model  # noqa: PLC0415
    from anysize.io.provenance import source_generation  # noqa: PLC0415
    from anysize.proof import algebra, whole  # noqa: PLC0415
    from anysize.proof.verdict import Verification  # noqa: PLC0415

    # Before anything is made: it may be damaged.
    generation = source_generation(plan, tensors)
    made = target_tensors(plan, tensors, allow_nonfinite=allow_nonfinite)
    rows = algebra.rows_of(NamedTensors(plan.target_config, made))
    proof = Verification(checks=(algebra.check_rows(plan, algebra.rows_of(tensors), rows),))
    _require(proof, "the proof of the tensors made")
    dtypes = {recipe.dtype for recipe in plan.recipes}
    widest = max(dtypes, key=["F16", "BF16", "F32", "F64"].index)
    model = build_model(plan.model_class, plan.target_config, made, TORCH[widest])
    if verify != "off":
        proof += whole.compare_made(plan, tensors, made, full=verify == "full")
        _require(proof, "the comparison of the whole models")
    # Without one of its own the model keeps what transformers made of the config.
    if generation is not None and model.can_generate():
        model.generation_config = generation
    return model, proof


def _to_disk(
    plan: Plan,
    tensors: TensorSource,
    made: CheckpointWriter,
    verify: VerifyMode,
    allow_nonfinite: bool,
    progress: Progress,
) -> Verification:
    from anysize.proof import algebra, whole  # noqa: PLC0415
    from anysize.proof.coverage import check_written  # noqa: PLC0415
    from anysize.proof.verdict import Verification  # noqa: PLC0415

    done = 0

    def wrote(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        progress("write", done, plan.num_bytes)

    progress("write", 0, plan.num_bytes)
    made.write(plan, tensors, allow_nonfinite=allow_nonfinite, progress=wrote)
    source_rows = algebra.rows_of(tensors)
    proof = Verification(
        checks=(
            check_written(plan, made.folder),
            algebra.check_rows(plan, source_rows, algebra.rows_from_files(made.places)),
        )
    )
    _require(proof, "the proof of the written tensors")
    if verify != "off":
        progress("verify", 0, 1)
        proof += whole.compare_written(plan, tensors, made.folder, full=verify == "full")
        progress("verify", 1, 1)
        _require(proof, "the comparison of the whole models")
    return proof
