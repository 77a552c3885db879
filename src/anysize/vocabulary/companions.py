"""The files beside a checkpoint whose tokens were cut: tokenizer and settings under new ids, none under the old.

Vocabularies in other forms (vocab.json, merges.txt, tokenizer.model) are left out: tokenizer.json says all they say.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from anysize.axis import AxisMap
from anysize.errors import CheckpointError
from anysize.vocabulary.ids import new_ids, renumbered
from anysize.vocabulary.keep import json_object
from anysize.vocabulary.tokenizer_file import TOKENIZER, TokenizerFile

_LEFT_OUT = ("vocab*", "merges.txt", "*.model", "*.model.*", "*.tiktoken")
_DECODER = "added_tokens_decoder"


def _text(found: Mapping[str, Any]) -> bytes:
    return (json.dumps(found, ensure_ascii=False, indent=2) + "\n").encode()


def _settings(settings: dict[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return tokenizer_config.json under new ids."""
    found = renumbered(settings, new)
    # Code does not travel.
    found.pop("auto_map", None)
    if isinstance(table := settings.get(_DECODER), dict):
        if odd := [i for i in table if not str(i).isdecimal()]:
            raise CheckpointError(f"tokenizer_config.json: {_DECODER} names {odd[0]!r}, wanted the id of a token")
        found[_DECODER] = {str(new[int(i)]): token for i, token in table.items() if int(i) in new}
    return found


def rewritten(folder: Path, files: Iterable[tuple[str, bytes]], axis: AxisMap) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a checkpoint's companions as they stand beside the target; `axis` is the map of `vocab`.

    Raises CheckpointError for a file that is damaged, or a setting whose ids cannot be followed.
    """
    new = new_ids(axis)
    for name, data in files:
        path = folder / name
        if name == TOKENIZER:
            yield name, TokenizerFile(data.decode(), str(path)).cut(new).encode()
        elif name == "tokenizer_config.json":
            yield name, _text(_settings(json_object(path), new))
        elif name == "added_tokens.json":
            added = json_object(path)
            if odd := [token for token, i in added.items() if not isinstance(i, int)]:
                raise CheckpointError(f"'{path}': the token {odd[0]!r} has {added[odd[0]]!r}, wanted its id")
            yield name, _text({token: new[i] for token, i in added.items() if i in new})
        elif name == "generation_config.json":
            yield name, _text(renumbered(json_object(path), new))
        elif not any(fnmatch(name, pattern) for pattern in _LEFT_OUT):
            yield name, data
