"""Read a model's config and refuse, by name, every setting that the family's table does not understand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anysize.arch import table
from anysize.arch.expression import evaluate, names
from anysize.arch.schema import COMMON_KEPT, Architecture
from anysize.errors import ArchitectureError, CheckpointError, did_you_mean, joined

MISSING = object()
# Where a config says how many positions there are; `understand` has seen that it is a number of them.
_POSITIONS = ("max_position_embeddings", "n_positions")


def per_layer_values(config: SourceConfig, key: str) -> list[Any] | None:
    """Return a config list with one entry a layer, as transformers fills it in where the config leaves it out."""
    values = config.raw.get(key)
    if values is None:
        from transformers import CONFIG_MAPPING  # noqa: PLC0415

        full = CONFIG_MAPPING[config.architecture.model_type].from_dict(dict(config.raw))
        values = getattr(full, key, None)
    if values is None or isinstance(values, list | tuple):
        return None if values is None else list(values)
    raise ArchitectureError(f"the config's {key} is {values!r}, wanted a list with one entry a layer")


@dataclass(frozen=True)
class SourceConfig:
    """A config that the table understands: `raw` as on disk, `full` with the defaults that the table reads."""

    architecture: Architecture
    raw: Mapping[str, Any]
    full: Mapping[str, Any]
    model_class: str

    def value(self, expression: str) -> Any:
        return evaluate(expression, self.full)

    def holds(self, condition: str) -> bool:
        return bool(evaluate(condition, self.full))

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Axis name -> size."""
        return {axis: int(evaluate(text, self.full)) for axis, text in self.architecture.axes.items()}

    @property
    def num_positions(self) -> int | None:
        """Most tokens of a sequence that the config gives positions to; None where it does not say."""
        return next((self.full[key] for key in _POSITIONS if self.full.get(key) is not None), None)

    @property
    def tied(self) -> bool:
        return bool(self.architecture.tied) and self.holds(self.architecture.tied_when)

    @property
    def init_std(self) -> float:
        return float(self.value(self.architecture.init_std))


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint folder; raise CheckpointError when it is absent or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"'{folder}' is not a checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"'{path}' holds a {type(config).__name__}, wanted a JSON object")
    return config


def default_of(architecture: Architecture, key: str) -> Any:
    """Return transformers' default for a config key, or MISSING; imports transformers, so it is asked last."""
    from transformers import CONFIG_MAPPING  # noqa: PLC0415

    return CONFIG_MAPPING[architecture.model_type]().to_dict().get(key, MISSING)


def _unknown(architecture: Architecture, raw: Mapping[str, Any]) -> list[str]:
    known = architecture.handled_keys | set(architecture.kept) | set(COMMON_KEPT) | set(architecture.defaults)

    def off(key: str, default: Any) -> bool:
        # What transformers does not know and is switched off asks for nothing.
        return raw[key] == default or (default is MISSING and raw[key] is False)

    return [
        f"{key}={raw[key]!r}{did_you_mean(key, known)}"
        for key in raw
        if key not in known and not off(key, default_of(architecture, key))
    ]


def understand(raw: Mapping[str, Any]) -> SourceConfig:
    """Return the config with its table, or refuse: unknown family, class, setting, or quantized weights.

    Raises ArchitectureError. All unknown settings are named at once.
    """
    if not isinstance(raw.get("model_type"), str):
        raise ArchitectureError("the config has no 'model_type', so the family cannot be told")
    architecture = table(raw["model_type"])
    raw = {architecture.renamed.get(key, key): value for key, value in raw.items()}
    if raw.get("quantization_config") is not None:
        raise ArchitectureError("the checkpoint is quantized (quantization_config): resize the unquantized original")
    classes = raw.get("architectures") or [architecture.classes[0]]
    if not isinstance(classes, list):
        raise ArchitectureError(f"the config's 'architectures' is {classes!r}, wanted a list of class names")
    if classes[0] not in architecture.classes:
        raise ArchitectureError(
            f"the checkpoint holds a {classes[0]}; the table '{architecture.model_type}' knows "
            f"{', '.join(architecture.classes)}"
        )
    unknown = _unknown(architecture, raw)
    if unknown:
        raise ArchitectureError(
            f"the config has settings that the table '{architecture.model_type}' does not know and that may change "
            f"the function: {joined(unknown)}; remove them or teach the table (docs/add-an-architecture.md)"
        )
    full = {**architecture.defaults, **raw}
    # transformers derives the label count from the names where it is not given, and assumes two labels without either.
    labels = raw.get("id2label") or {0: "", 1: ""}
    if not isinstance(labels, dict):
        raise ArchitectureError(f"the config's id2label is {labels!r}, wanted an object of label names")
    full.setdefault("num_labels", len(labels))
    needed = sorted(architecture.handled_keys - set(full) - set(architecture.per_layer))
    if needed:
        raise ArchitectureError(f"the config lacks {', '.join(needed)}")
    _require_types(architecture, full)
    for rule in architecture.refused:
        if not evaluate(rule.holds, full):
            raise ArchitectureError(f"a {architecture.model_type} with not ({rule.holds}) is refused: {rule.reason}")
    return SourceConfig(architecture, dict(raw), full, classes[0])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require_types(architecture: Architecture, full: Mapping[str, Any]) -> None:
    """Refuse settings that the table reads and that are no size, flag or number, all at once."""
    wrong: list[str] = []
    for axis, text in architecture.axes.items():
        try:
            size = evaluate(text, full)
        except (TypeError, ZeroDivisionError):
            size = None
        if not _is_size(size):
            given = ", ".join(f"{key}={full[key]!r}" for key in sorted(names(text)))
            wrong.append(f"the {axis} axis has no whole size of at least 1 ({given})")
    for key in _POSITIONS:
        # As an axis it may have been named already.
        if not (full.get(key) is None or _is_size(full[key]) or any(f"{key}=" in told for told in wrong)):
            wrong.append(f"{key}={full[key]!r} is no whole number of at least 1")
    for key, default in architecture.defaults.items():
        if isinstance(default, bool) and not isinstance(full[key], bool | None):
            wrong.append(f"{key}={full[key]!r} is neither true nor false")
    std = evaluate(architecture.init_std, full)
    if not isinstance(std, int | float) or isinstance(std, bool) or not 0 <= std < float("inf"):
        wrong.append(f"{architecture.init_std}={std!r} is not a standard deviation")
    if wrong:
        raise ArchitectureError(f"the config's sizes make no sense: {joined(wrong)}")
