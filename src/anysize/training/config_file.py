"""Config files: YAML without surprises, overrides, and one sentence for everything that is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from anysize.errors import InputError, did_you_mean, joined


def _allowed(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the section at a path has."""
    section: type[BaseModel] | None = model
    # Of sections by name (`arms`), the next part of the path is a name.
    named = False
    for name in path:
        if named or section is None:
            named = False
            continue
        if name not in section.model_fields:
            return []
        annotation = section.model_fields[str(name)].annotation
        named = get_origin(annotation) is dict
        choices = get_args(annotation) or (annotation,)
        section = next((kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return list(section.model_fields) if section else []


_KINDS = ("str", "int", "float")


def _sections_in_unions(model: type[BaseModel]) -> set[str]:
    """Return the names of the sections for which something else may stand, such as a file for a calibration."""
    found: set[str] = set()
    for field in model.model_fields.values():
        choices = [kind for kind in get_args(field.annotation) if kind is not type(None)] or [field.annotation]
        sections = [kind for kind in choices if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if len(choices) > 1 and get_origin(field.annotation) is not dict:
            found |= {section.__name__ for section in sections}
        for section in sections:
            found |= _sections_in_unions(section)
    return found


def _of_the_right_kind(error: ValidationError, sections: set[str]) -> list[Any]:
    """Return what is wrong, without complaints that a section is no plain value, where one may stand for it."""
    problems = error.errors()
    inside = {problem["loc"][:i] for problem in problems for i, part in enumerate(problem["loc"]) if part in sections}
    return [p for p in problems if not (p["loc"] and p["loc"][-1] in _KINDS and p["loc"][:-1] in inside)]


def refusals(error: ValidationError, model: type[BaseModel], origin: str) -> InputError:
    """Return one sentence for all that is wrong with a config, with the nearest known key for each unknown one."""
    told: list[str] = []
    sections = _sections_in_unions(model)
    for problem in _of_the_right_kind(error, sections):
        # A union's branches have names of their own in the path: of a plain type, or of a section.
        *path, last = [part for part in problem["loc"] if part not in _KINDS and part not in sections] or [""]
        where = ".".join(str(part) for part in (*path, last) if part)
        if problem["type"] == "extra_forbidden":
            known = _allowed(model, tuple(path))
            told.append(f"unknown key '{where}'{did_you_mean(str(last), known)}")
        elif problem["type"] == "missing":
            told.append(f"'{where}' is missing")
        else:
            got = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
            told.append(f"{where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}{got}")
    return InputError(f"the config '{origin}' cannot be used: {joined(dict.fromkeys(told))}")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without code, where a key that stands twice is an error instead of the last one winning."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        # What is merged (<<: *other) gives way to what stands beside it, as YAML says.
        written = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in written]
        if twice := {str(key) for key in keys if keys.count(key) > 1}:
            what = f"{joined(sorted(twice))} stands twice"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e-3 for a word; people mean a number.
_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$")
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; raise InputError where there is none."""
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the config '{path}': {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the config '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise InputError(f"the config '{path}' holds no keys: wanted a mapping")
    return found


def overridden(raw: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a config with `section.key=value` set, values read as YAML; raise InputError for what is none."""
    made = {**raw}
    for text in overrides:
        path, found, value = text.partition("=")
        if not found or not path:
            raise InputError(f"--set {text}: wanted key=value, such as training.learning_rate=1e-3")
        *sections, last = path.split(".")
        place = made
        for section in sections:
            inner = place.get(section) or {}
            if not isinstance(inner, dict):
                raise InputError(f"--set {text}: '{section}' is no section")
            place[section] = {**inner}
            place = place[section]
        try:
            place[last] = yaml.load(value, Loader=_UniqueKeys)
        except yaml.YAMLError as error:
            raise InputError(f"--set {text}: the value is not YAML: {' '.join(str(error).split())}") from error
    return made


def spelled(raw: Mapping[str, Any]) -> str:
    """Return a config as YAML text."""
    return yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True)
