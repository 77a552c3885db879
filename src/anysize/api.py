"""The public functions: calibrate, plan, apply, resize, verify. Everything a command does can be done from Python."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from pydantic import ValidationError

from anysize import target as targets
from anysize.config import SourceConfig, read_config, understand
from anysize.delivery import VerifyMode, carry_out, require_output
from anysize.errors import InputError, SizeError, joined
from anysize.io.hub import local_folder, open_source
from anysize.io.reader import TensorSource
from anysize.layers import LEAVE_ONE_OUT, listed_depth
from anysize.planner import legality, make_plan
from anysize.progress import Progress, quiet
from anysize.recipe import Options, Plan
from anysize.target import PUBLIC_SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from anysize.calibration.scores import Scores
    from anysize.proof.verdict import Verification
    from anysize.vocabulary.keep import KeptTokens
    from anysize.vocabulary.wish import Wish

DtypeName = Literal["keep", "float32", "bfloat16", "float16"]


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
    """Return explicit public sizes, the depth of listed layers too, on top of one of scale, num_params and like."""
    shortcuts = [
        name for name, value in (("scale", scale), ("num_params", num_params), ("like", like)) if value is not None
    ]
    if len(shortcuts) > 1:
        raise SizeError(f"{' and '.join(shortcuts)} both choose the sizes: give one of them")
    chosen: dict[str, int] = {}
    explicit = {name: size for name, size in sizes.items() if size is not None}
    depth = listed_depth(options.layers, config.sizes["layer"])
    if scale is not None:
        chosen = targets.scaled(config, scale)
    elif num_params is not None:
        fixed = explicit | ({} if depth is None else {"num_hidden_layers": depth})
        chosen = targets.for_budget(config, num_params, legality(config, options), fixed, untie=options.untie)
    elif like is not None:
        chosen = targets.like(config, understand(read_config(local_folder(str(like), without_weights=True))))
    if depth is not None:
        chosen["num_hidden_layers"] = depth
    chosen |= explicit
    if not chosen and not options.untie and options.dtype == "keep" and options.stream_scale == 1:
        raise SizeError(
            f"no size was asked for: give at least one of {', '.join(PUBLIC_SIZES)}, scale, num_params, like; or "
            "untie, stream_scale or a dtype"
        )
    if not chosen and options.preset != "auto":
        raise SizeError(f"preset '{options.preset}': no size was asked for, so there is nothing that it could do")
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
    calibration: str | Path | Scores | Callable[[], Scores] | None = None,
    column: str = "",
    select: str = "auto",
    readers: str = "auto",
    layers: str = "auto",
    search_tokens: int = 2_000_000,
    noise_db: float = 10.0,
    seed: int = 0,
    dtype: DtypeName = "keep",
    untie: bool = False,
    stream_scale: float = 1.0,
    low_memory: bool = False,
    progress: Progress = quiet,
) -> Plan:
    """Return the plan that makes these sizes out of `source`, reading configs and tensor headers only.

    Sizes that are not given stay as they are; `scale` (width), `num_params` and `like` (another model's config) choose
    them. What is kept when a size is below the source's is told by `preset`, `select`, `readers` and `layers` (a list
    such as "0-3,2-5" also sets the depth), and for most of them by `calibration`: scores, a scores file, data to
    calibrate on (in this process alone, also where it is one of several), or a function that gives scores once the
    sizes are known to be legal. `search_tokens` is what the layers "evolutionary" may run on, sets of layers times
    tokens (an image has as many as patches). `keep_tokens` cuts the vocabulary: ids or token strings, a .json or
    .tokens file that lists them, or text, whose tokens (with `vocab_size`, so many of the most frequent) are kept;
    `Plan.kept_tokens.index[new id]` is a token's old id. `stream_scale` multiplies what writes the residual stream,
    and leaves what is computed. `column` is the text column of both, where the data have several. `low_memory`
    leaves weights, scores and fitted matrices on disk and reads each as it is needed, for the same plan; where they
    do not fit into a quarter of the free memory that is done anyway. Raises SizeError, InputError,
    ArchitectureError or CheckpointError, each with one sentence: what is wrong, the nearest legal sizes.
    """
    tensors = open_source(source)
    config = understand(tensors.config)
    options = _options(
        preset=preset, select=select, readers=readers, seed=seed, layers=layers, search_tokens=search_tokens,
        noise_db=noise_db, dtype=dtype, untie=untie, stream_scale=stream_scale,
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
    if column and not _are_data(calibration):
        from anysize.vocabulary.wish import is_text  # noqa: PLC0415

        if not is_text(keep_tokens):
            raise InputError(f"column={column!r}: neither calibration nor keep_tokens reads data here; leave it out")
    if keep_tokens is not None:
        from anysize.vocabulary.keep import kept_tokens  # noqa: PLC0415

        if pad_vocab_to_multiple_of is not None:
            raise SizeError("pad_vocab_to_multiple_of adds rows and keep_tokens takes some: give text and a vocab_size")
        tokens = kept_tokens(tensors, config, keep_tokens, vocab_size, progress, column)
        sizes["vocab_size"] = tokens.axis.target_size
        # What scale, num_params and like choose is counted without the tokens that go.
        smaller = targets.resolve(config, {"vocab_size": tokens.axis.target_size}).config
    elif pad_vocab_to_multiple_of is not None:
        if not targets.is_number(pad_vocab_to_multiple_of, int) or pad_vocab_to_multiple_of < 1:
            raise SizeError(f"pad_vocab_to_multiple_of={pad_vocab_to_multiple_of!r}: wanted at least 1")
        sizes["vocab_size"] = targets.padded_vocab(config, vocab_size, pad_vocab_to_multiple_of)
    request = _request(smaller, options, sizes, scale, num_params, like)
    scores = _scores_of(tensors, calibration, column, options, low_memory, progress)
    measures = callable(calibration) or _are_data(calibration)
    return make_plan(tensors, request, options, scores, progress, tokens, measures=measures, low_memory=low_memory)


def _are_data(calibration: str | Path | Scores | Callable[[], Scores] | None) -> bool:
    return isinstance(calibration, (str, Path)) and not str(calibration).endswith(".safetensors")


def _scores_of(
    tensors: TensorSource,
    calibration: str | Path | Scores | Callable[[], Scores] | None,
    column: str,
    options: Options,
    low_memory: bool,
    progress: Progress,
) -> Callable[[], Scores] | None:
    """Return how to come by the scores once they are needed: loaded from a file, or measured on data."""
    if calibration is None or callable(calibration):
        return calibration

    def scores() -> Scores:
        from anysize.calibration.calibrate import CalibrationOptions, calibrated  # noqa: PLC0415
        from anysize.calibration.data import DataOptions, default_items, default_length  # noqa: PLC0415
        from anysize.calibration.scores import Scores  # noqa: PLC0415

        if isinstance(calibration, Scores):
            return calibration
        if not _are_data(calibration):
            return Scores.load(Path(calibration).expanduser(), low_memory=low_memory)
        config = understand(tensors.config)
        data = DataOptions(default_items(config), default_length(config), column=column)
        how = CalibrationOptions(
            data, leave_one_out=options.layers == LEAVE_ONE_OUT, low_memory=low_memory,
            # Where several processes are at work, one may be alone in making a plan.
            shared=False,
        )  # fmt: skip
        return calibrated(tensors, str(calibration), how, progress=progress)

    return scores


def calibrate(
    source: str | Path | PreTrainedModel,
    data: str | Path,
    *,
    output: str | Path | None = None,
    tokens: int | None = None,
    sequence_length: int | None = None,
    batch_size: int = 8,
    column: str = "",
    label_column: str = "label",
    second_moments: bool = True,
    leave_one_out: bool = False,
    low_memory: bool = False,
    device: str = "auto",
    tokenizer: str = "",
    progress: Progress = quiet,
) -> Scores:
    """Run a source on data and return what its activations say about every axis and layer, for any target size.

    `data` is a text file, a folder of them, parquet or jsonl with a text column (`column` where there are several), a
    Hub data set, or images for an image model (`tokens` then counts images). Where nothing else is said, 131,072 tokens
    in sequences of 256, shorter where the model has fewer positions, or 2,048 images. `second_moments` are what least-
    squares readers and principal directions need; `leave_one_out` also measures the loss without each layer (for an
    image model against the integers in `label_column`). `low_memory` runs layer by layer, with one layer and its sums
    in memory, for the same scores, which stay on disk; where the model or the sums of all layers do not fit that is
    done anyway. Under torchrun every process takes a share of the data and waits for the others, so every process has
    to call this. `output` is written whole at the end; a killed run goes on where it was. Raises InputError for data
    that cannot be used.
    """
    from anysize.calibration.calibrate import CalibrationOptions, calibrated  # noqa: PLC0415
    from anysize.calibration.data import DataOptions, default_items, default_length  # noqa: PLC0415

    opened = open_source(source)
    config = understand(opened.config)
    tokens = default_items(config) if tokens is None else tokens
    sequence_length = default_length(config) if sequence_length is None else sequence_length
    counts = {"tokens": tokens, "sequence_length": sequence_length, "batch_size": batch_size}
    if wrong := [f"{name}={value}" for name, value in counts.items() if value < 1]:
        raise InputError(f"{joined(wrong)}: wanted at least 1")
    return calibrated(
        opened,
        str(data),
        CalibrationOptions(
            data=DataOptions(tokens, sequence_length, batch_size, column, label_column),
            second_moments=second_moments,
            leave_one_out=leave_one_out,
            low_memory=low_memory,
            device=device,
        ),
        tokenizer=tokenizer,
        output=None if output is None else Path(output).expanduser(),
        progress=progress,
    )


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
    progress: Progress = quiet,
) -> PreTrainedModel | Path:
    """Carry out a plan: return a plain transformers model, or stream it to the folder `output` and return its path.

    The miniature proof runs before any write, coverage and algebra on sampled real rows after it, and with `verify`
    "auto" (where both models fit in a quarter of the free memory) or "full" the comparison of whole models. The output
    appears atomically; a killed run is resumed by the same call. `source` is needed for plans of a model in memory.
    Raises ProofError when a proof fails, CheckpointError or OutputError for what cannot be read or written.
    """
    return carry_out(plan, output, source, verify, max_shard_size, overwrite, allow_nonfinite, command, progress)[0]


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
    progress: Progress = quiet,
) -> tuple[Path, Verification]:
    """Like `apply` to a folder, and return the proof as well."""
    made, proof = carry_out(plan, output, source, verify, max_shard_size, overwrite, allow_nonfinite, command, progress)
    return cast("Path", made), proof


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
    column: str = "",
    select: str = "auto",
    readers: str = "auto",
    layers: str = "auto",
    search_tokens: int = 2_000_000,
    noise_db: float = 10.0,
    seed: int = 0,
    dtype: DtypeName = "keep",
    untie: bool = False,
    stream_scale: float = 1.0,
    low_memory: bool = False,
    verify: VerifyMode = "auto",
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> PreTrainedModel | Path:
    """Plan, prove and apply in one call: return a plain model in memory, or the path of the folder written.

    Options are those of `plan` and `apply`, and so are the errors.
    """
    if output is not None:
        require_output(source, Path(output).expanduser(), overwrite=overwrite)
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
        column=column,
        select=select,
        readers=readers,
        layers=layers,
        search_tokens=search_tokens,
        noise_db=noise_db,
        seed=seed,
        dtype=dtype,
        untie=untie,
        stream_scale=stream_scale,
        low_memory=low_memory,
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
