"""Requested sizes, a ratio, a parameter budget or another model -> a config that the family allows, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from math import lcm
from types import UnionType
from typing import Any

from anysize.arch.expression import evaluate
from anysize.config import SourceConfig
from anysize.errors import SizeError, did_you_mean, joined
from anysize.tensors import num_parameters

PUBLIC_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_experts",
)
_PLAIN = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_hidden_layers": "layer",
    "vocab_size": "vocab",
    "num_experts": "expert",
    "head_dim": "head",
}

_LARGEST = 2**24
_MOST_LAYERS = 10_000
# The nearest legal size is looked for this far from the one asked for.
_NEAR = 4096


@dataclass(frozen=True)
class Target:
    """A legal target: the size of every axis and the config that says so (without per-layer lists)."""

    sizes: Mapping[str, int]
    config: SourceConfig


def public_sizes(config: SourceConfig) -> dict[str, int]:
    """Return a model's sizes under transformers' usual names, whatever its family calls them."""
    sizes = config.sizes
    found = {public: sizes[axis] for public, axis in _PLAIN.items() if axis in sizes}
    return found | {"num_attention_heads": sizes["kv"] * sizes["group"], "num_key_value_heads": sizes["kv"]}


def _heads(config: SourceConfig, request: Mapping[str, int]) -> tuple[int, int]:
    """Return (kv, group) of the target. What is not given stays; whole kv groups follow their kv head."""
    sizes, keys = config.sizes, config.architecture.keys
    kv, group = sizes["kv"], sizes["group"]
    heads, kv_wanted = request.get("num_attention_heads"), request.get("num_key_value_heads")
    if "kv" not in keys:
        if kv_wanted not in (None, heads, kv if heads is None else heads):
            raise SizeError(
                f"num_key_value_heads={kv_wanted}: every query head of a {config.architecture.model_type} has its own"
            )
        return (heads or kv), 1
    if heads is None:
        return (kv_wanted or kv), group
    if kv_wanted is None:
        kv_wanted = heads if group == 1 and kv > 1 else kv
    if heads % kv_wanted:
        more = "" if "num_key_value_heads" in request else ": give num_key_value_heads as well"
        raise SizeError(f"num_attention_heads={heads} cannot be shared out evenly over {kv_wanted} kv heads{more}")
    return kv_wanted, heads // kv_wanted


def _tied_width(config: SourceConfig, request: Mapping[str, int], sizes: dict[str, int]) -> None:
    """Settle hidden = heads * head_dim for families whose head width is not a config key; heads follow."""
    hidden, head = sizes["hidden"], sizes["head"]
    if "num_attention_heads" not in request and "num_key_value_heads" not in request:
        # Whole groups follow; with a single kv head it is the group that grows.
        group = sizes["group"] if sizes["kv"] > 1 else 1
        unit = head * group
        if hidden % unit:
            raise SizeError(
                f"hidden_size={hidden} is not a whole number of kv groups, {unit} wide each, and "
                f"{config.architecture.model_type} has no separate head width: give head_dim or the heads as well"
            )
        if sizes["kv"] > 1 or sizes["group"] == 1:
            sizes["kv"] = hidden // unit
        else:
            sizes["group"] = hidden // head
        return
    heads = sizes["kv"] * sizes["group"]
    if "hidden_size" not in request and "head_dim" in request:
        hidden = sizes["hidden"] = heads * head
    elif "head_dim" not in request and hidden % heads == 0:
        head = sizes["head"] = hidden // heads
    if heads * head != hidden:
        raise SizeError(
            f"{heads} heads of width {head} make {heads * head}, not hidden_size={hidden}, and "
            f"{config.architecture.model_type} has no separate head width: hidden_size={heads * head} fits these heads"
        )


def _sizes(config: SourceConfig, request: Mapping[str, int]) -> dict[str, int]:
    sizes = dict(config.sizes)
    for public, axis in _PLAIN.items():
        if public in request:
            if axis not in sizes:
                raise SizeError(f"{public}: a {config.architecture.model_type} has no {axis} axis")
            sizes[axis] = request[public]
    sizes["kv"], sizes["group"] = _heads(config, request)
    if "head" not in config.architecture.keys:
        _tied_width(config, request, sizes)
    return sizes


def _write_back(config: SourceConfig, sizes: Mapping[str, int]) -> SourceConfig:
    architecture = config.architecture
    values = {**sizes, "heads": sizes["kv"] * sizes["group"]}
    changes: dict[str, Any] = {key: values[axis] for axis, key in architecture.keys.items()}
    for key, followed in architecture.follows.items():
        if config.full[key] == config.full[followed]:
            changes[key] = changes[followed]
    return SourceConfig(architecture, {**config.raw, **changes}, {**config.full, **changes}, config.model_class)


def _rope(config: SourceConfig, sizes: Mapping[str, int]) -> list[str]:
    if config.architecture.rotary and sizes["head"] != config.sizes["head"]:
        return [
            f"head_dim {config.sizes['head']} -> {sizes['head']}: rotary positions turn pairs of channels by fixed "
            f"angles, so no wider head computes the same function; keep head_dim={config.sizes['head']}"
        ]
    return []


def _changed_parts(source: SourceConfig, target: SourceConfig) -> list[str]:
    """Return the parameters that exist at the one size and not at the other (an OPT's projection of its embedding)."""
    return [
        f"{name.partition('|')[0]} {'appears' if target.holds(parameter.when) else 'goes'} (needs {parameter.when})"
        for name, parameter in source.architecture.parameters.items()
        if source.holds(parameter.when) != target.holds(parameter.when)
    ]


def is_number(value: object, kind: type | UnionType) -> bool:
    """Whether a value from outside is a number of this kind; `True` is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def resolve(config: SourceConfig, request: Mapping[str, int]) -> Target:
    """Return the legal target for the requested public sizes; raise SizeError naming every rule that fails."""
    for public, size in request.items():
        if public not in PUBLIC_SIZES:
            raise SizeError(f"unknown size '{public}'{did_you_mean(public, PUBLIC_SIZES)}")
        if not is_number(size, int) or not 1 <= size < _LARGEST:
            raise SizeError(f"{public}={size!r} is not a size: wanted a whole number of at least 1, below 2^24")
    if request.get("num_hidden_layers", 0) > _MOST_LAYERS:
        raise SizeError(f"num_hidden_layers={request['num_hidden_layers']}: wanted at most {_MOST_LAYERS:,}")
    sizes = _sizes(config, request)
    rope = _rope(config, sizes)
    if rope:
        raise SizeError(joined(rope))
    target = _write_back(config, sizes)
    changed = _changed_parts(config, target)
    if changed:
        raise SizeError(f"at these sizes a {config.architecture.model_type} has other parts: {joined(changed)}")
    broken = [
        f"{rule.reason} (needs {rule.holds})"
        for rule in config.architecture.rules
        if not evaluate(rule.holds, target.full)
    ]
    if broken:
        raise SizeError(joined(broken))
    return Target(sizes, target)


def _legal(config: SourceConfig, request: Mapping[str, int], check: Callable[[Target], object]) -> bool:
    try:
        check(resolve(config, request))
    except SizeError:
        return False
    return True


def _near(size: int, source: int) -> Iterator[int]:
    """Yield sizes on the same side of the source's own, the nearest first: all near ones, then whole copies."""

    def same_side(candidate: int) -> bool:
        return candidate >= source if size >= source else 1 <= candidate <= source

    for distance in range(1, _NEAR):
        yield from (s for s in (size - distance, size + distance) if same_side(s))
    copies = size // source
    yield from (s for s in (copies * source, (copies + 1) * source) if copies and abs(s - size) >= _NEAR)


def nearest_legal(
    config: SourceConfig,
    request: Mapping[str, int],
    public: str,
    check: Callable[[Target], object],
    *,
    size: int,
    step: int = 1,
) -> list[int]:
    """Return at most two legal values of one size of a request, multiples of `step`, the nearest ones, in order."""
    near = (s for s in _near(size, public_sizes(config)[public]) if s % step == 0)
    return sorted(islice((s for s in near if _legal(config, {**request, public: s}, check)), 2))


def resolve_or_suggest(config: SourceConfig, request: Mapping[str, int], check: Callable[[Target], object]) -> Target:
    """Like `resolve` with a further `check`; its SizeError also names the nearest legal values of a size given."""
    try:
        target = resolve(config, request)
        check(target)
        return target
    except SizeError as error:
        source = public_sizes(config)
        for public, size in request.items():
            if not is_number(size, int) or public not in source:
                continue
            if near := nearest_legal(config, request, public, check, size=size):
                values = " or ".join(map(str, near))
                raise SizeError(f"{error}; nearest legal {public}: {values}") from error
        raise


# From this width on products run on units that want multiples of 8.
_WIDE = 512


def scaled(config: SourceConfig, scale: float) -> dict[str, int]:
    """Return the public sizes of a model `scale` times as wide at equal depth: heads and ffn in step, legal.

    hidden_size is rounded to what the head count divides, intermediate_size to a multiple of 8 where it was one; of a
    model that is wide enough for matrix units to matter, hidden_size as well.
    """
    if not is_number(scale, int | float) or not 0 < scale < float("inf"):
        raise SizeError(f"scale {scale!r}: wanted a number above 0")
    if scale >= _LARGEST:
        raise SizeError(f"scale {scale!r}: wanted a number below 2^24, as sizes are")
    sizes = config.sizes
    kv = max(1, round(sizes["kv"] * scale)) if sizes["kv"] > 1 else 1
    group = sizes["group"] if sizes["kv"] > 1 else max(1, round(sizes["group"] * scale))
    heads = kv * group
    unit = heads if "head" in config.architecture.keys else sizes["head"] * (group if kv > 1 else 1)
    if sizes["hidden"] >= _WIDE and sizes["hidden"] % 8 == 0:
        unit = lcm(unit, 8)
    hidden = max(1, round(sizes["hidden"] * scale / unit)) * unit
    if scale >= 1 and hidden < sizes["hidden"]:
        hidden = -(-sizes["hidden"] // unit) * unit
    step = 8 if sizes["ffn"] % 8 == 0 else 1
    ffn = max(1, round(sizes["ffn"] * scale / step)) * step
    wanted = {"hidden_size": hidden, "intermediate_size": ffn}
    if "head" in config.architecture.keys:
        wanted["num_attention_heads"] = heads
        if "kv" in config.architecture.keys:
            wanted["num_key_value_heads"] = kv
    return wanted


def untied(config: SourceConfig, target: Target) -> Target:
    """Return a target whose head is a matrix of its own; raise SizeError where the source's is one already."""
    if not config.tied:
        raise SizeError("untie: the head of this model is not tied to its embedding")
    changes = {config.architecture.tied_when: False}
    raw, full = ({**values, **changes} for values in (target.config.raw, target.config.full))
    return Target(target.sizes, SourceConfig(config.architecture, raw, full, config.model_class))


def for_budget(
    config: SourceConfig,
    num_params: int,
    check: Callable[[Target], object],
    fixed: Mapping[str, int] | None = None,
    *,
    untie: bool = False,
) -> dict[str, int]:
    """Return the public sizes of the legal width-scaled target whose parameter count is nearest to `num_params`.

    fixed: public sizes that are given, which the width goes with. untie: whether the head becomes a matrix of its own.
    """
    given = dict(fixed or {})

    def request_of(scale: float) -> dict[str, int]:
        return scaled(config, scale) | given

    def counted(request: Mapping[str, int]) -> int:
        target = resolve(config, request)
        return num_parameters((untied(config, target) if untie else target).config)

    here = counted(request_of(1.0)) if _legal(config, request_of(1.0), lambda _: None) else num_parameters(config)
    if not is_number(num_params, int | float) or not num_params < float("inf"):
        raise SizeError(f"num_params {num_params!r} is not a count")
    if num_params < 1:
        raise SizeError(f"num_params {num_params:,}: wanted at least 1")
    if num_params > (most := here * _LARGEST // 2):
        raise SizeError(f"num_params is too large: wanted at most {most:,}, 2^23 times what the source has")
    best: tuple[int, dict[str, int]] | None = None
    seen: set[tuple[int, ...]] = set()
    high = max(2.0, 1.5 * num_params / here)
    for step in range(1, 2001):
        request = request_of(1 + (high - 1) * step / 2000 if num_params >= here else step / 2000)
        key = tuple(request.values())
        if key in seen or not _legal(config, request, check):
            continue
        seen.add(key)
        distance = abs(counted(request) - num_params)
        if best is None or distance < best[0]:
            best = distance, request
    if best is not None and best[0] > num_params / 4:
        nearest = counted(best[1])
        raise SizeError(
            f"num_params {num_params:,}: the nearest legal config has {nearest:,}; give the sizes themselves"
        )
    if best is None:
        # Where a given size is what stands in the way, this says so.
        check(resolve(config, request_of(1.0)))
        raise SizeError(f"num_params {num_params:,}: no legal width-scaled config was found; give the sizes themselves")
    if "intermediate_size" in given:
        return best[1]
    return _nearer(config, best[1], num_params, check, counted, grows=num_params >= here)


def _nearer(
    config: SourceConfig, request: dict[str, int], num_params: int, check: Callable[[Target], object],
    counted: Callable[[Mapping[str, int]], int], *, grows: bool,
) -> dict[str, int]:  # fmt: skip
    """Return the sizes with an ffn that makes up, by at most an eighth, for what rounding a wide hidden left over."""
    ffn = request["intermediate_size"]
    if config.sizes["hidden"] < _WIDE or config.sizes["ffn"] % 8:
        return request

    here, wider = (counted({**request, "intermediate_size": size}) for size in (ffn, ffn + 8))
    moved, most = round((num_params - here) / (wider - here)) * 8, ffn // 64 * 8
    made = ffn + max(-most, min(most, moved))
    # Whichever way the rest goes, this goes, or stays.
    made = max(made, config.sizes["ffn"]) if grows else min(made, config.sizes["ffn"])
    nearer = {**request, "intermediate_size": made}
    return nearer if _legal(config, nearer, check) else request


def like(config: SourceConfig, other: SourceConfig) -> dict[str, int]:
    """Return the public sizes of another model, as far as the source's family has them."""
    theirs, ours = public_sizes(other), public_sizes(config)
    request = {public: size for public, size in theirs.items() if public in ours}
    if "kv" not in config.architecture.keys:
        request.pop("num_key_value_heads")
    return request


def padded_vocab(config: SourceConfig, vocab_size: int | None, multiple: int) -> int:
    """Return the vocabulary size, asked for or the source's, rounded up to a multiple."""
    if "vocab" not in config.sizes:
        raise SizeError(f"pad_vocab_to_multiple_of: a {config.architecture.model_type} has no vocab axis")
    return -(-(vocab_size or config.sizes["vocab"]) // multiple) * multiple


_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str | None) -> int | None:
    """Return the number that `350M` or `1.3B` spells; raise SizeError otherwise."""
    if text is None:
        return None
    unit = text[-1:].upper()
    try:
        count = int(float(text[:-1]) * _UNITS[unit]) if unit in _UNITS else int(text)
    except (ValueError, OverflowError):
        count = 0
    if count < 1:
        raise SizeError(f"num_params '{text}' is not a count: wanted something like 350M or 1.3B")
    return count
