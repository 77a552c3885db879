"""The data of tasks: parquet files in a folder of the user's, checked before lm-eval sees them.

The files in `tasks/` name `read` as their data set, so nothing is downloaded and nothing lands in a cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anysize.errors import InputError, joined

_COLUMNS = {
    "pair": {"UID": str, "sentence_good": str, "sentence_bad": str},
    "passage": {"context": str, "continuation": str},
    "question": {"query": str, "choices": list, "gold": int},
}
Row = dict[str, Any]


def read(*, task_data: str, file: str, kind: str, paradigm: str = "", **_told: object) -> dict[str, Any]:
    """Return {"test": the rows of a file}, as lm-eval wants it; of a BLiMP paradigm only its own.

    lm-eval passes all of its metadata, of which `task_data` is ours and the rest (versions, the model's arguments) says
    nothing about data, and what stands in the task's file. Raises InputError where the file lacks a column or a row is
    not what the task reads.
    """
    from datasets import Dataset  # noqa: PLC0415

    path = Path(task_data) / file
    found = _rows(path, _COLUMNS[kind], paradigm)
    if not found:
        of = f" of the paradigm '{paradigm}'" if paradigm else ""
        raise InputError(f"the task file '{path}' holds no rows{of}")
    for number, row in enumerate(found):
        if problem := _problem(row, kind):
            raise InputError(f"row {number} of the task file '{path}' cannot be used: {problem}")
    return {"test": Dataset.from_list(found)}


def _rows(path: Path, columns: dict[str, type], paradigm: str) -> list[Row]:
    from pyarrow import ArrowException, parquet  # noqa: PLC0415

    try:
        there = parquet.read_schema(path).names
        if missing := [name for name in columns if name not in there]:
            raise InputError(f"the task file '{path}' has no column {joined(missing)}: it has {joined(there)}")
        chosen = [("UID", "==", paradigm)] if paradigm else None
        return parquet.read_table(path, columns=list(columns), filters=chosen).to_pylist()
    except (OSError, ArrowException) as error:
        raise InputError(f"cannot read the task file '{path}': {' '.join(str(error).split())[:200]}") from error


def _problem(row: Row, kind: str) -> str:
    for name, wanted in _COLUMNS[kind].items():
        if not isinstance(row[name], wanted) or row[name] in ("", []):
            return f"{name} is {row[name]!r}, wanted a {wanted.__name__}"
    if kind == "question":
        if not all(isinstance(choice, str) and choice for choice in row["choices"]):
            return f"choices are {row['choices']!r}, wanted texts"
        if not 0 <= row["gold"] < len(row["choices"]):
            return f"gold is {row['gold']}, and there are {len(row['choices'])} choices"
    return ""
