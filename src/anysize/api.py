"""The public functions: calibrate, plan, apply, resize, verify. Everything a command does can be done from Python."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from pydantic import ValidationError

from anysize import target as targets
from anysize.config import SourceConfig, read_config, understand
from anysize.errors import CheckpointError, InputError, OutputError, ProofError, SizeError, joined
from anysize.io.hub import local_folder, open_checkpoint
from anysize.io.reader import Checkpoint, TensorSource
from anysize.planner import legality, make_plan
from anysize.recipe import Options, Plan
from anysize.target import PUBLIC_SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anysize.calibration.scores import Scores
    from anysize.io.writer import CheckpointWriter
    from anysize.proof.verdict import Verification
    from anysize.vocabulary.keep import KeptTokens
    from anysize.vocabulary.wish import Wish

VerifyMode = Literal["auto", "full", "off"]
DtypeName = Literal["keep", "float32", "bfloat16", "float16"]
Progress = Callable[[str, int, int], None]
"""Called as progress(stage, done, total); stages are "tokens" (read so far), "calibrate" and "search" (in tokens),
"leave one out", "fit" (in layers), "proof", "write" (in bytes), "verify"."""


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def open_source(source: str | Path | PreTrainedModel) -> TensorSource:
    """Return a folder, a Hub id or a loaded model as a source of tensors; raise CheckpointError if it is none."""
    if isinstance(source, (str, Path)):
        return open_checkpoint(str(source))
    if not hasattr(source, "config") or not hasattr(source, "state_dict"):
        raise InputError(f"the source is a {type(source).__name__}, wanted a folder, a Hub id or a transformers model")
    from anysize.io.models import LoadedModel  # noqa: PLC0415

    return LoadedModel(source)


def _options(**options: object) -> Options:
    try:
        return Options.model_validate(options)
    except ValidationError as error:
        raise SizeError(joined(f"{e['loc'][0]}={e['input']!r}: {e['msg']}" for e in error.errors())) from error


def _request(
    config: SourceConfig,
    options: Options,
    sizes: dict[str, int | None],
    scale: float | None,
    num_params: int | None,
    like: str | Path | None,
) -> dict[str, int]:
    """Return explicit public sizes on top of at most one of scale, num_params and like."""
    shortcuts = [
        name for name, value in (("scale", scale), ("num_params", num_params), ("like", like)) if value is not None
    ]
    if len(shortcuts) > 1:
        raise SizeError(f"{' and '.join(shortcuts)} both choose the sizes: give one of them")
    chosen: dict[str, int] = {}
    if scale is not None:
        chosen = targets.scaled(config, scale)
    elif num_params is not None:
        chosen = targets.for_budget(config, num_params, legality(config, options))
    elif like is not None:
        chosen = targets.like(config, understand(read_config(local_folder(str(like), config_only=True))))
    chosen |= {name: size for name, size in sizes.items() if size is not None}
    if not chosen and not options.untie and options.dtype == "keep":
        raise SizeError(
            f"no size was asked for: give at least one of {', '.join(PUBLIC_SIZES)}, scale, num_params, like"
        )
    return chosen


def plan(
    source: str | Path | PreTrainedModel,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    keep_tokens: Wish | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    num_experts: int | None = None,
    scale: float | None = None,
    num_params: int | None = None,
    like: str | Path | None = None,
    preset: str = "auto",
    calibration: str | Path | Scores | None = None,
    select: str = "auto",
    readers: str = "auto",
    layers: str = "auto",
    search_tokens: int = 2_000_000,
    noise_db: float = 10.0,
    seed: int = 0,
    dtype: DtypeName = "keep",
    untie: bool = False,
    progress: Progress = _silent,
) -> Plan:
    """Return the plan that makes these sizes out of `source`, reading configs and tensor headers only.

    Sizes that are not given stay as they are; `scale` (width), `num_params` and `like` (another model's config) choose
    them. What is kept when a size is below the source's is told by `preset`, `select`, `readers` and `layers`, and for
    most of them by `calibration`: scores, a scores file, or data to calibrate on. `search_tokens` is what the layers
    "evolutionary" may run on, sets of layers times tokens (an image has as many as patches). `keep_tokens` cuts the
    vocabulary: ids or token strings, a .json or .tokens file that lists them, or text, whose tokens (with `vocab_size`,
    so many of the most frequent) are kept; `Plan.kept_tokens.index[new id]` is a token's old id. Raises SizeError,
    InputError, ArchitectureError or CheckpointError, each with one sentence: what is wrong, the nearest legal sizes.
    """
    tensors = open_source(source)
    config = understand(tensors.config)
    options = _options(
        preset=preset, select=select, readers=readers, seed=seed, layers=layers, search_tokens=search_tokens,
        noise_db=noise_db, dtype=dtype, untie=untie,
    )  # fmt: skip
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "num_experts": num_experts,
    }
    tokens: KeptTokens | None = None
    smaller = config
    if keep_tokens is not None:
        from anysize.vocabulary.keep import kept_tokens  # noqa: PLC0415

        if pad_vocab_to_multiple_of is not None:
            raise SizeError("pad_vocab_to_multiple_of adds rows and keep_tokens takes some: give text and a vocab_size")
        tokens = kept_tokens(tensors, config, keep_tokens, vocab_size, progress)
        sizes["vocab_size"] = tokens.axis.target_size
        # What scale, num_params and like choose is counted without the tokens that go.
        smaller = targets.resolve(config, {"vocab_size": tokens.axis.target_size}).config
    elif pad_vocab_to_multiple_of is not None:
        if not targets.is_number(pad_vocab_to_multiple_of, int) or pad_vocab_to_multiple_of < 1:
            raise SizeError(f"pad_vocab_to_multiple_of={pad_vocab_to_multiple_of!r}: wanted at least 1")
        sizes["vocab_size"] = targets.padded_vocab(config, vocab_size, pad_vocab_to_multiple_of)
    request = _request(smaller, options, sizes, scale, num_params, like)
    return make_plan(tensors, request, options, _scores_of(tensors, calibration, progress), progress, tokens)


def _scores_of(
    tensors: TensorSource, calibration: str | Path | Scores | None, progress: Progress
) -> Callable[[], Scores] | None:
    """Return how to come by the scores once they are needed: loaded from a file, or measured on data."""
    if calibration is None:
        return None

    def scores() -> Scores:
        from anysize.calibration.calibrate import CalibrationOptions, calibrated  # noqa: PLC0415
        from anysize.calibration.scores import Scores  # noqa: PLC0415

        if isinstance(calibration, Scores):
            return calibration
        if str(calibration).endswith(".safetensors"):
            return Scores.load(Path(calibration).expanduser())
        return calibrated(tensors, str(calibration), CalibrationOptions(), progress=progress)

    return scores


def calibrate(
    source: str | Path | PreTrainedModel,
    data: str | Path,
    *,
    output: str | Path | None = None,
    tokens: int = 131_072,
    sequence_length: int = 256,
    batch_size: int = 8,
    column: str = "",
    second_moments: bool = True,
    leave_one_out: bool = False,
    low_memory: bool = False,
    device: str = "auto",
    tokenizer: str = "",
    progress: Progress = _silent,
) -> Scores:
    """Run a source on data and return what its activations say about every axis and layer, for any target size.

    `data` is a text file, a folder of them, parquet or jsonl with a text column (`column` where there are several), a
    Hub data set, or images for an image model (`tokens` then counts images). `second_moments` are what least-squares
    readers and principal directions need; `leave_one_out` also measures the loss without each layer. `low_memory`
    leaves the weights on disk and reads each module's as it runs. `output` is written whole at the end; a killed run
    goes on where it was. Raises InputError for data that cannot be used.
    """
    from anysize.calibration.calibrate import CalibrationOptions, calibrated  # noqa: PLC0415
    from anysize.calibration.data import DataOptions  # noqa: PLC0415

    counts = {"tokens": tokens, "sequence_length": sequence_length, "batch_size": batch_size}
    if wrong := [f"{name}={value}" for name, value in counts.items() if value < 1]:
        raise InputError(f"{joined(wrong)}: wanted at least 1")
    return calibrated(
        open_source(source),
        str(data),
        CalibrationOptions(
            data=DataOptions(tokens, sequence_length, batch_size, column),
            second_moments=second_moments,
            leave_one_out=leave_one_out,
            low_memory=low_memory,
            device=device,
        ),
        tokenizer=tokenizer,
        output=None if output is None else Path(output).expanduser(),
        progress=progress,
    )


def _same_source(plan: Plan, tensors: TensorSource) -> None:
    found = {"config": (tensors.config_sha256, plan.source.config_sha256),
             "tensor headers": (tensors.headers_sha256, plan.source.headers_sha256)}  # fmt: skip
    if plan.kept_tokens is not None:
        from anysize.vocabulary.keep import tokenizer_sha256  # noqa: PLC0415

        found["tokenizer"] = (tokenizer_sha256(tensors), plan.tokenizer_sha256)
    changed = [what for what, (now, planned) in found.items() if now != planned]
    if changed:
        raise CheckpointError(
            f"'{tensors.location}' is not the source this plan was made for: its {joined(changed)} changed; plan again"
        )


def _require(proof: Verification, what: str) -> None:
    if not proof.passed:
        raise ProofError(f"{what} failed, and nothing was kept: {joined(proof.failures)}")


def _fingerprint(plan: Plan, tensors: TensorSource) -> str:
    return hashlib.sha256(f"{plan.to_json()}{tensors.identity}".encode()).hexdigest()


def apply(
    plan: Plan,
    output: str | Path | None = None,
    *,
    source: str | Path | PreTrainedModel | None = None,
    verify: VerifyMode = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    command: str = "anysize.apply(plan, output)",
    progress: Progress = _silent,
) -> PreTrainedModel | Path:
    """Carry out a plan: return a plain transformers model, or stream it to the folder `output` and return its path.

    The miniature proof runs before any write, coverage and algebra on sampled real rows after it, and with `verify`
    "auto" (where both models fit in a quarter of the free memory) or "full" the comparison of whole models. The output
    appears atomically; a killed run is resumed by the same call. `source` is needed for plans of a model in memory.
    Raises ProofError when a proof fails, CheckpointError or OutputError for what cannot be read or written.
    """
    return _carry_out(plan, output, source, verify, max_shard_size, overwrite, allow_nonfinite, command, progress)[0]


def apply_with_proof(
    plan: Plan,
    output: str | Path,
    *,
    source: str | Path | PreTrainedModel | None = None,
    verify: VerifyMode = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    command: str = "anysize.apply_with_proof(plan, output)",
    progress: Progress = _silent,
) -> tuple[Path, Verification]:
    """Like `apply` to a folder, and return the proof as well."""
    made, proof = _carry_out(
        plan, output, source, verify, max_shard_size, overwrite, allow_nonfinite, command, progress
    )
    return cast("Path", made), proof


def _carry_out(
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
    from anysize.io import provenance, writer  # noqa: PLC0415
    from anysize.proof import coverage, replan  # noqa: PLC0415
    from anysize.proof.algebra import rows_of  # noqa: PLC0415
    from anysize.proof.miniature import prove_on_miniature  # noqa: PLC0415

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
    with writer.CheckpointWriter(path, plan.recipes, _fingerprint(plan, tensors), max_shard_bytes) as made:
        proof += _to_disk(plan, tensors, made, verify, allow_nonfinite, progress)
        for name, data in provenance.files_beside(plan, tensors, proof, command):
            made.add(name, data)
        made.finish()
    return path, proof


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
    from anysize.io.models import LoadedModel, NamedTensors, build_model  # noqa: PLC0415
    from anysize.io.provenance import generation_of  # noqa: PLC0415
    from anysize.proof import algebra, whole  # noqa: PLC0415
    from anysize.proof.verdict import Verification  # noqa: PLC0415

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
    if isinstance(tensors, LoadedModel) and model.can_generate():
        model.generation_config = generation_of(plan, tensors.model)
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


def resize(
    source: str | Path | PreTrainedModel,
    output: str | Path | None = None,
    *,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_hidden_layers: int | None = None,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    keep_tokens: Wish | None = None,
    pad_vocab_to_multiple_of: int | None = None,
    num_experts: int | None = None,
    scale: float | None = None,
    num_params: int | None = None,
    like: str | Path | None = None,
    preset: str = "auto",
    calibration: str | Path | Scores | None = None,
    select: str = "auto",
    readers: str = "auto",
    layers: str = "auto",
    search_tokens: int = 2_000_000,
    noise_db: float = 10.0,
    seed: int = 0,
    dtype: DtypeName = "keep",
    untie: bool = False,
    verify: VerifyMode = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> PreTrainedModel | Path:
    """Plan, prove and apply in one call: return a plain model in memory, or the path of the folder written.

    Options are those of `plan` and `apply`, and so are the errors.
    """
    made = plan(
        source,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        keep_tokens=keep_tokens,
        pad_vocab_to_multiple_of=pad_vocab_to_multiple_of,
        num_experts=num_experts,
        scale=scale,
        num_params=num_params,
        like=like,
        preset=preset,
        calibration=calibration,
        select=select,
        readers=readers,
        layers=layers,
        search_tokens=search_tokens,
        noise_db=noise_db,
        seed=seed,
        dtype=dtype,
        untie=untie,
    )
    return apply(
        made,
        output,
        source=source,
        verify=verify,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        command="anysize.resize(...)",
    )


def verify(
    source: str | Path | PreTrainedModel, target: str | Path | PreTrainedModel, *, full: bool = True
) -> Verification:
    """Compare two models of one family and return every check with its control; nothing is raised for a difference.

    A target made by anysize brings its plan: then tolerances follow its storage, and what the plan calls inexact is
    told, not required. Raises CheckpointError when a folder is not a checkpoint.
    """
    from anysize.proof import whole  # noqa: PLC0415

    return whole.compare(source, target, full=full)
