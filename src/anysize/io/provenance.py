"""What stands beside the weights: config, tokenizer files, a model card with the exact command, plan and proof."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from anysize import __version__
from anysize.errors import CheckpointError
from anysize.io.reader import Checkpoint, TensorSource, stays_inside
from anysize.proof.verdict import Verification
from anysize.recipe import Plan
from anysize.vocabulary.companions import rewritten
from anysize.vocabulary.ids import new_ids, renumbered
from anysize.vocabulary.keep import json_object

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "anysize.json"
_GENERATION = "generation_config.json"
_COPIED = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "additional_chat_templates/*", _GENERATION, "*preprocessor_config.json",
    "processor_config.json", "LICENSE*",
)  # fmt: skip


def companions(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the files that travel with a checkpoint, none of which asks for code.

    Links that leave the folder are left out.
    """
    seen: set[str] = set()
    for pattern in _COPIED:
        for path in sorted(folder.glob(pattern)):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in seen and stays_inside(folder, path):
                seen.add(name)
                yield name, _without_code(path.read_bytes())


def _without_code(data: bytes) -> bytes:
    """Return the content of a file without the classes of its own that it names: their code does not travel."""
    if b'"auto_map"' not in data:
        return data
    try:
        found = json.loads(data)
    except ValueError:
        return data
    if not isinstance(found, dict) or "auto_map" not in found:
        return data
    kept = {key: value for key, value in found.items() if key != "auto_map"}
    return (json.dumps(kept, ensure_ascii=False, indent=2) + "\n").encode()


def source_generation(plan: Plan, tensors: TensorSource) -> Any:
    """Return the generation config of a source, with the target's token ids; None where it has none of its own.

    Raises CheckpointError for one that is damaged.
    """
    from anysize.io.models import LoadedModel  # noqa: PLC0415

    if isinstance(tensors, LoadedModel):
        return generation_of(plan, tensors.model) if tensors.model.can_generate() else None
    return _generation_beside(plan, tensors) if isinstance(tensors, Checkpoint) else None


def _generation_beside(plan: Plan, source: Checkpoint) -> Any:
    from transformers import GenerationConfig  # noqa: PLC0415

    from anysize.io.models import quiet_transformers  # noqa: PLC0415

    path = source.folder / _GENERATION
    if not path.is_file() or not stays_inside(source.folder, path):
        return None
    found = json_object(path)
    if plan.kept_tokens is not None:
        found = renumbered(found, new_ids(plan.kept_tokens))
    try:
        with quiet_transformers():
            return GenerationConfig.from_dict(found)
    except (TypeError, ValueError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"transformers refuses '{path}': {why}; mend or remove it") from error


def generation_of(plan: Plan, source: PreTrainedModel) -> Any:
    """Return a copy of a model's generation config, with the target's token ids; None where it has none."""
    found: Any = copy.deepcopy(source.generation_config)
    if found is not None and plan.kept_tokens is not None:
        before = found.to_dict()
        after = renumbered(before, new_ids(plan.kept_tokens))
        for key in before:
            if after.get(key) != before[key]:
                setattr(found, key, after.get(key))
    return found


def target_companions(plan: Plan, tensors: TensorSource) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the source's files that stand beside the target, in the target's token ids."""
    if isinstance(tensors, Checkpoint):
        found = companions(tensors.folder)
        kept = plan.kept_tokens
        yield from found if kept is None else rewritten(tensors.folder, found, kept)
    elif (config := source_generation(plan, tensors)) is not None:
        yield _GENERATION, config.to_json_string().encode()


def files_beside(
    plan: Plan, tensors: TensorSource, proof: Verification, command: str, digests: Mapping[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of everything that stands beside the target's weights, whose rows have these digests."""
    yield from target_companions(plan, tensors)
    yield RECORD, record_json(plan, proof, command, digests)
    yield "README.md", model_card(plan, proof, command)
    yield "config.json", config_json(plan)


def config_json(plan: Plan) -> bytes:
    """Return the target's config.json."""
    config = {**plan.target_config, "architectures": [plan.model_class]}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def record_json(plan: Plan, proof: Verification, command: str, digests: Mapping[str, str]) -> bytes:
    """Return anysize.json: command, versions, plan and proof, and digests of what was written."""
    record: dict[str, Any] = {
        "anysize": __version__,
        "command": command,
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors", "numpy")}
        | {"python": platform.python_version()},
        "exact": plan.exact,
        "inexact_because": list(plan.inexact),
        "proof": json.loads(proof.model_dump_json()),
        "plan": plan.model_dump(mode="json"),
        "rows": dict(digests),
    }
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what anysize.json of a checkpoint says, None where there is none; raise CheckpointError if damaged."""
    path = folder / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        shown = {"command": str(record["command"]), "exact": bool(record["exact"]), "plan": record["plan"],
                 "rows": dict(record.get("rows", {}))}  # fmt: skip
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is not a record of anysize ({error!r}): mend or remove it") from error
    return shown


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def model_card(plan: Plan, proof: Verification, command: str) -> bytes:
    """Return README.md: what this model is made from, how, and what was proved."""
    location = Path(plan.source.location)
    base = location.name if location.is_absolute() else plan.source.location
    head = {"base_model": base, "library_name": "transformers", "tags": ["anysize", plan.preset]}
    keep = "computes the same function as its source" if plan.exact else "does not compute its source's function"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {base}, resized",
        "",
        f"{plan.num_parameters:,} parameters from {plan.source_num_parameters:,} with the preset `{plan.preset}` "
        f"(seed {plan.seed}) by anysize {__version__}. At step 0 it {keep}.",
        "",
        *(f"- not exact: {reason}" for reason in plan.inexact),
        *(f"- note: {note}" for note in plan.notes),
        "",
        "```",
        command,
        "```",
        "",
        _row(["check", "what", "measured", "allowed", "a wrong answer measures", "unit"]),
        _row(["---"] * 6),
        *(
            _row([c.name, c.what, f"{c.measured:.2g}", f"{c.tolerance:.2g}",
                  "" if c.control is None else f"{c.control:.2g}", c.unit])
            for c in proof.checks
        ),
        "",
        f"`{RECORD}` holds the plan, the proof and the versions.",
        "",
    ]  # fmt: skip
    return "\n".join(lines).encode()
