"""`anysize resize`: plan, prove, stream to disk and verify in one go."""

from __future__ import annotations

from typing import Annotated

import typer

from anysize.cli import options as o


def resize(
    source: o.Source,
    output: o.Output,
    hidden_size: o.HiddenSize = None,
    intermediate_size: o.IntermediateSize = None,
    num_hidden_layers: o.NumHiddenLayers = None,
    num_attention_heads: o.NumAttentionHeads = None,
    num_key_value_heads: o.NumKeyValueHeads = None,
    head_dim: o.HeadDim = None,
    vocab_size: o.VocabSize = None,
    keep_tokens: o.KeepTokens = None,
    pad_vocab_to_multiple_of: o.PadVocab = None,
    num_experts: o.NumExperts = None,
    scale: o.Scale = None,
    num_params: o.NumParams = None,
    like: o.Like = None,
    preset: o.PresetName = "auto",
    calibration: o.Calibration = None,
    column: o.Column = "",
    select: o.SelectName = o.Select.auto,
    readers: o.ReadersName = o.Readers.auto,
    layers: o.Layers = "auto",
    search_tokens: o.SearchTokens = 2_000_000,
    noise_db: o.NoiseDb = 10.0,
    seed: o.Seed = 0,
    dtype: o.DtypeName = o.Dtype.keep,
    untie: o.Untie = False,
    stream_scale: o.StreamScale = 1.0,
    low_memory: o.LowMemory = False,
    verify: o.VerifyName = o.Verify.auto,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
    allow_nonfinite: o.AllowNonfinite = False,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Show the plan and stop.")] = False,
    json: o.Json = False,
) -> None:
    """Resize SOURCE into the folder OUTPUT: a plain transformers checkpoint, with its plan and proof inside."""
    from anysize.cli.carry_out import carry_out  # noqa: PLC0415
    from anysize.cli.show import show_plan  # noqa: PLC0415
    from anysize.cli.sizes import planned  # noqa: PLC0415
    from anysize.delivery import require_output  # noqa: PLC0415

    if not plan_only:
        require_output(source, output.expanduser(), overwrite=overwrite)
    made = planned(
        source,
        {
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads,
            "num_key_value_heads": num_key_value_heads,
            "head_dim": head_dim,
            "vocab_size": vocab_size,
            "pad_vocab_to_multiple_of": pad_vocab_to_multiple_of,
            "num_experts": num_experts,
        },
        keep_tokens=keep_tokens,
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
    if plan_only:
        show_plan(made, as_json=json)
        return
    if not json:
        show_plan(made, as_json=False)
    carry_out(
        made,
        output,
        verify=verify,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        as_json=json,
    )
