"""What a user asks to keep: a list of tokens, in Python or in a file, or text whose tokens are counted.

A list is ids or token strings, as the tokenizer spells them: a Python sequence, a .json file with a list, or a .tokens
file with one string a line. Everything else is text.
"""

from __future__ import annotations

import json
import numbers
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from anysize.errors import InputError, did_you_mean, joined
from anysize.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Set as AbstractSet

Wish = str | Path | Iterable[int] | Iterable[str]

_SHOWN = 5
_SPACES = ("Ġ", "▁", "##")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the token list '{path}': {error}") from error


def _json_list(path: Path) -> list[Any] | None:
    """Return the list that a JSON file holds, None where it holds documents."""
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError):
        return None  # one document a line
    if isinstance(found, dict) and found and all(isinstance(value, int) for value in found.values()):
        raise InputError(f"'{path}' is a vocabulary (token -> id), not a list: name the tokens to keep as a JSON list")
    return found if isinstance(found, list) and not any(isinstance(item, dict) for item in found) else None


def _no_list_in_disguise(path: Path, tokens: Mapping[str, int]) -> None:
    """Refuse a .txt file that could as well be a list: every other line, or more, is one token."""
    lines = [line for line in _read(path).split("\n") if line]
    found = sum(line in tokens for line in lines)
    if len(lines) > 1 and 2 * found >= len(lines):
        raise InputError(
            f"'{path}' may be text or a token list ({found} of its {len(lines)} lines are tokens): name a list "
            f"{path.stem}.tokens, or put the text into a folder"
        )


def listed(wish: object, tokens: Mapping[str, int] | None) -> list[Any] | None:
    """Return the ids or token strings that are listed, None where the wish is text. Raises InputError."""
    found: list[Any] | None
    if isinstance(wish, str) and not wish.strip():
        raise InputError("keep_tokens is empty: name a token list or text whose tokens stay")
    if not isinstance(wish, (str, Path)):
        if not isinstance(wish, Iterable):
            raise InputError(f"keep_tokens={wish!r}: wanted a list of tokens, a file with one, or text")
        origin, found = "keep_tokens", list(wish)
    else:
        path = Path(wish).expanduser()
        origin, found = f"'{path}'", None
        if path.suffix == ".json" and path.is_file():
            found = _json_list(path)
        elif path.suffix == ".tokens":
            found = [line for line in _read(path).split("\n") if line]
        elif path.suffix == ".txt" and path.is_file() and tokens is not None:
            _no_list_in_disguise(path, tokens)
        if found is None:
            return None
    if not found:
        raise InputError(f"{origin} is an empty token list: name at least one token to keep")
    if not all(_is_id(item) for item in found) and not all(isinstance(item, str) for item in found):
        raise InputError(f"{origin} is a list of {_kinds(found)}: wanted token ids or token strings, not both")
    return found


def is_text(wish: object) -> bool:
    """Whether a wish is text, whose tokens are counted, rather than a list or none. Raises InputError."""
    return isinstance(wish, (str, Path)) and listed(wish, None) is None


def _is_id(item: object) -> bool:
    return not isinstance(item, bool) and isinstance(item, numbers.Integral)


def _kinds(items: list[Any]) -> str:
    return " and ".join(sorted({type(item).__name__ for item in items}))


def ids_of(found: list[Any], tokens: Mapping[str, int] | None, size: int) -> set[int]:
    """Return the ids of listed tokens; raise InputError naming those that the tokenizer or the model does not have."""
    if isinstance(found[0], str):
        assert tokens is not None
        unknown = [token for token in found if token not in tokens]
        if unknown:
            raise InputError(f"the tokenizer has no token {_some(map(repr, unknown))}{_hint(unknown[0], tokens)}")
        return {tokens[token] for token in found}
    ids = {int(cast("int", item)) for item in found}
    known: AbstractSet[int] = set(range(size)) if tokens is None else set(tokens.values())
    if unknown := sorted(ids - known):
        whose = f"the model has ids 0-{size - 1}" if tokens is None else "the tokenizer has no such token"
        raise InputError(f"unknown token id {_some(map(str, unknown))}: {whose}")
    return ids


def _some(items: Iterable[str]) -> str:
    shown = list(items)
    return joined(shown[:_SHOWN]) + (f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else "")


def _hint(token: str, tokens: Mapping[str, int]) -> str:
    for mark in _SPACES:
        if (spelled := mark + token.lstrip(" ")) in tokens:
            return f" (did you mean {spelled!r}?)"
    return did_you_mean(token, tokens)


def counted(data: str, source: str, size: int, progress: Progress, column: str = "") -> Counter[int]:
    """Return how often each token id occurs in all of some text, by the tokenizer beside `source`. Raises InputError.

    `column` is the text column, where there are several. `progress` hears the tokens so far, as stage "tokens".
    """
    from anysize.io.models import tokenizer_of  # noqa: PLC0415
    from anysize.io.rows import documents  # noqa: PLC0415

    tokenizer = tokenizer_of(source)
    counts: Counter[int] = Counter()
    read = 0
    for text in documents(data, column):
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        counts.update(ids)
        read += len(ids)
        progress("tokens", read, 0)
    if not counts:
        raise InputError(f"the data '{data}' hold no token")
    if (highest := max(counts)) >= size:
        raise InputError(
            f"the tokenizer gives id {highest}, the model has {size} tokens: this tokenizer is not the model's"
        )
    return counts
