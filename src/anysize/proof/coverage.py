"""Exactly-once accounting: every target tensor is made once, every source tensor is used or listed as dropped."""

from __future__ import annotations

import re
from collections import Counter
from math import prod
from pathlib import Path

from anysize.arch.schema import Architecture
from anysize.config import SourceConfig, understand
from anysize.errors import CheckpointError, ProofError, joined
from anysize.io.reader import ReadRows, TensorSource, read_header
from anysize.notation import parse
from anysize.proof.verdict import Check
from anysize.recipe import BYTES, Plan, Recipe
from anysize.tensors import expected_tensors, shape_of

_SHOWN = 5
_COMPARED_ITEMS = 1 << 22


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def _drop_reason(architecture: Architecture, name: str) -> str | None:
    for pattern, reason in architecture.dropped.items():
        if re.fullmatch(re.escape(pattern).replace(r"\{layer\}", r"\d+"), name):
            return reason
    return None


def _on_disk_names(config: SourceConfig, tensors: TensorSource) -> dict[str, str]:
    """Return table name -> name in the file: headless checkpoints lack the base prefix."""
    base = f"{config.architecture.base}."
    if any(name.startswith(base) for name in tensors.tensors):
        return {name: name for name in tensors.tensors}
    return {f"{base}{name}" if name not in config.architecture.tied else name: name for name in tensors.tensors}


def check_source(config: SourceConfig, tensors: TensorSource) -> tuple[dict[str, str], dict[str, str]]:
    """Return (table name -> name in the file, dropped tensors with reasons), or refuse the checkpoint.

    Raises CheckpointError naming all missing tensors, all that nothing accounts for, and all wrong shapes at once.
    """
    expected = expected_tensors(config)
    names = _on_disk_names(config, tensors)
    dropped: dict[str, str] = {}
    problems: list[str] = []
    missing = [name for name in expected if name not in names]
    if missing:
        problems.append(f"missing tensors: {_some(missing)}")
    extra: list[str] = []
    for name, stored in names.items():
        if name in expected:
            continue
        if config.tied and name in config.architecture.tied:
            dropped[stored] = f"a second copy of {config.architecture.tied[name]}, which it is tied to"
        elif (reason := _drop_reason(config.architecture, name)) is not None:
            dropped[stored] = reason
        else:
            extra.append(stored)
    if extra:
        problems.append(
            f"tensors that a {config.architecture.model_type} with this config does not have: {_some(extra)}"
        )
    wrong = [
        f"{name}: got {list(tensors.tensors[names[name]].shape)}, wanted {list(shape)}"
        for name, item in expected.items()
        if name in names and tensors.tensors[names[name]].shape != (shape := shape_of(item.arrow, config.sizes))
    ]
    if wrong:
        problems.append(f"wrong shapes: {_some(wrong)}")
    odd = [
        f"{s}: {tensors.tensors[s].dtype}"
        for s in names.values()
        if tensors.tensors[s].dtype not in BYTES and s not in dropped
    ]
    if odd:
        problems.append(f"storage types other than {', '.join(BYTES)}: {_some(odd)}")
    if problems:
        raise CheckpointError(f"'{tensors.location}' does not hold what its config says: {joined(problems)}")
    return names, dropped


def _axis_sizes(plan: Plan) -> tuple[dict[str, int], dict[str, int]]:
    """Return the (source, target) size of every axis; layers and experts differ in what is kept, never in how much."""
    common = {axis: m for axis, m in plan.axes.items() if "." not in axis}
    return {a: m.source_size for a, m in common.items()}, {a: m.target_size for a, m in common.items()}


def _misfit(recipe: Recipe, plan: Plan, tensors: TensorSource, sizes: tuple[dict[str, int], dict[str, int]]) -> str:
    """Return why a recipe cannot be carried out on this source with the plan's maps, or an empty string."""
    info = tensors.tensors.get(recipe.source)
    if info is None:
        return f"{recipe.name} is made of {recipe.source}, which the source does not hold"
    if (info.dtype, info.shape) != (recipe.source_dtype, recipe.source_shape):
        return (
            f"{recipe.name} is made of {recipe.source} as {recipe.source_dtype} {list(recipe.source_shape)}, "
            f"the source holds {info.dtype} {list(info.shape)}"
        )
    arrow = parse(recipe.arrow)
    if lacking := sorted({recipe.reader, recipe.writer, recipe.value} - plan.dense.keys() - {""}):
        return f"{recipe.name} needs the matrices {', '.join(lacking)}, which do not lie beside the plan"
    if recipe.value and plan.dense.place(recipe.value).shape != recipe.shape:
        return f"{recipe.name} is fitted as {list(plan.dense.place(recipe.value).shape)}, wanted {list(recipe.shape)}"
    unknown = sorted(arrow.axes - sizes[0].keys())
    if unknown:
        return f"{recipe.name} runs along {', '.join(unknown)}, for which the plan has no map"
    if (shapes := tuple(shape_of(arrow, size) for size in sizes)) != (recipe.source_shape, recipe.shape):
        return f"{recipe.name}: its arrow and the plan's maps make {list(shapes[0])} into {list(shapes[1])}"
    return ""


def account(plan: Plan, tensors: TensorSource) -> None:
    """Prove that the plan makes every tensor of the target config once, in the right shape, and drops none silently.

    Raises ProofError naming every tensor that is made twice, not made, not wanted, made of what the source does not
    hold, or unaccounted for.
    """
    target, stored = understand(plan.target_config), tensors.tensors
    wanted = {name: shape_of(item.arrow, target.sizes) for name, item in expected_tensors(target).items()}
    made = Counter(recipe.name for recipe in plan.recipes)
    problems = [f"{name} is made {count} times" for name, count in made.items() if count > 1]
    problems += [f"{name} is not made" for name in wanted if name not in made]
    problems += [f"{name} is made but the target has no such tensor" for name in made if name not in wanted]
    problems += [
        f"{recipe.name} is made as {list(recipe.shape)}, the target config wants {list(wanted[recipe.name])}"
        for recipe in plan.recipes
        if recipe.name in wanted and recipe.shape != wanted[recipe.name]
    ]
    problems += [f"{name} is dropped but the source has no such tensor" for name in plan.dropped if name not in stored]
    used = {recipe.source for recipe in plan.recipes} | set(plan.dropped)
    problems += [f"{name} of the source is neither used nor dropped" for name in stored if name not in used]
    sizes = _axis_sizes(plan)
    problems += [problem for recipe in plan.recipes if (problem := _misfit(recipe, plan, tensors, sizes))]
    if problems:
        raise ProofError(f"the plan does not account for every tensor: {joined(problems[:_SHOWN])}")


def _same_values(tensors: TensorSource, read: ReadRows, one: str, other: str) -> bool:
    shape = tensors.tensors[one].shape
    if shape != tensors.tensors[other].shape:
        return False
    step = max(1, _COMPARED_ITEMS * shape[0] // prod(shape))
    for first in range(0, shape[0], step):
        mine, theirs = (read(name, first, min(step, shape[0] - first)).double() for name in (one, other))
        if not mine.allclose(theirs, rtol=0, atol=0, equal_nan=True):
            return False
    return True


def check_tied_copies(plan: Plan, tensors: TensorSource, read: ReadRows) -> None:
    """Compare what a checkpoint stores beside a tensor that it is tied to, a block of rows at a time.

    Raises CheckpointError where they differ: then the file and its config name two different models.
    """
    config = understand(plan.source_config)
    names = _on_disk_names(config, tensors)
    for head, embedding in config.architecture.tied.items() if config.tied else ():
        if head not in names:
            continue
        if not _same_values(tensors, read, names[head], names[embedding]):
            raise CheckpointError(
                f"'{tensors.location}' stores '{names[head]}' with other values than '{names[embedding]}', to which "
                f"its config ties it: set {config.architecture.tied_when} to false in its config.json, or remove the "
                "copy that is wrong"
            )


def check_written(plan: Plan, folder: Path) -> Check:
    """Count the tensors in the files of `folder` that the plan does not make, or makes and that are not there.

    The control counts against the plan with its first recipe left out.
    """
    written = {n: (i.dtype, i.shape) for path in folder.glob("*.safetensors") for n, i in read_header(path).items()}
    wanted = {recipe.name: (recipe.dtype, recipe.shape) for recipe in plan.recipes}

    def differ(expected: dict[str, tuple[str, tuple[int, ...]]]) -> float:
        return float(len(set(expected.items()) ^ set(written.items())))

    return Check(
        name="coverage",
        what=f"{len(plan.recipes)} tensors made once; {len(plan.dropped)} of the source dropped, the rest used",
        unit="tensors unaccounted for",
        measured=differ(wanted),
        tolerance=0.0,
        control=differ({name: wanted[name] for name in list(wanted)[1:]}),
    )
