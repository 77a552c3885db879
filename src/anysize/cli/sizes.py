"""From the size options of a command to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from anysize.target import parse_count

if TYPE_CHECKING:
    from anysize.recipe import Plan


def planned(
    source: str,
    sizes: dict[str, int | None],
    *,
    keep_tokens: str | None,
    scale: float | None,
    num_params: str | None,
    like: str | None,
    preset: str,
    calibration: str | None,
    column: str,
    select: str,
    readers: str,
    layers: str,
    search_tokens: int,
    noise_db: float,
    seed: int,
    dtype: str,
    untie: bool,
    stream_scale: float,
    low_memory: bool,
) -> Plan:
    """Return the plan for a command's options."""
    from anysize import api  # noqa: PLC0415
    from anysize.cli.progress import progress_bars  # noqa: PLC0415

    with progress_bars(enabled=calibration is not None or keep_tokens is not None) as progress:
        return api.plan(
            source,
            hidden_size=sizes["hidden_size"],
            intermediate_size=sizes["intermediate_size"],
            num_hidden_layers=sizes["num_hidden_layers"],
            num_attention_heads=sizes["num_attention_heads"],
            num_key_value_heads=sizes["num_key_value_heads"],
            head_dim=sizes["head_dim"],
            vocab_size=sizes["vocab_size"],
            keep_tokens=keep_tokens,
            pad_vocab_to_multiple_of=sizes["pad_vocab_to_multiple_of"],
            num_experts=sizes["num_experts"],
            scale=scale,
            num_params=parse_count(num_params),
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
            dtype=cast("api.DtypeName", dtype),
            untie=untie,
            stream_scale=stream_scale,
            low_memory=low_memory,
            progress=progress,
        )
