"""Token ids in configs: which tokens a config names, and the same config once the tokens have new ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from anysize.axis import NEW, AxisMap
from anysize.config import MISSING, SourceConfig, default_of
from anysize.errors import CheckpointError, joined

_NAMED = "_token_id"
# What transformers fills in where a config leaves it out; a target says it, since the default is now another token.
_DEFAULTED = ("bos_token_id", "eos_token_id", "pad_token_id")
# Tokens that are never to be written: those that are cut cannot be.
_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SEQUENCES = ("bad_words_ids",)
_NOT_RENUMBERED = ("force_words_ids", "sequence_bias", "forced_decoder_ids")


def target_ids(config: SourceConfig, target: Mapping[str, Any], axis: AxisMap) -> dict[str, Any]:
    """Return a target's config with every id that the source means, default or not, under its new number."""
    new = new_ids(axis)
    spelled = {key: value for key, value in default_ids(config).items() if value in new}
    return renumbered({**spelled, **target}, new)


def default_ids(config: SourceConfig) -> dict[str, Any]:
    """Return the ids that transformers fills in because the config leaves them out."""
    missing = {key: default_of(config.architecture, key) for key in _DEFAULTED if key not in config.raw}
    return {key: value for key, value in missing.items() if value not in (MISSING, None)}


def new_ids(axis: AxisMap) -> dict[int, int]:
    """Return old id -> new id of the tokens that a map of `vocab` keeps."""
    return {int(old): new for new, old in enumerate(axis.index) if old != NEW}


def _ids(value: object) -> Iterator[int]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int) and not isinstance(item, bool):
            yield item


def named_ids(config: Mapping[str, Any]) -> set[int]:
    """Return the ids that a config names (`eos_token_id` and its like, lists included)."""
    return {i for key, value in config.items() if key.endswith(_NAMED) for i in _ids(value) if i >= 0}


def renumbered(config: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """Return a config or generation config with every token id replaced by its new one.

    `new` is old id -> new id of the tokens that are kept. Raises CheckpointError for settings that name tokens in a way
    that is not understood.
    """
    odd = [key for key in _NOT_RENUMBERED if config.get(key) is not None]
    if odd:
        raise CheckpointError(
            f"the generation config has {joined(odd)}, whose token ids cannot follow a cut vocabulary: remove it there"
        )

    def named(value: Any) -> Any:
        # An id that no token had (-1, or beyond the end) names none afterwards either.
        if isinstance(value, list):
            return [named(item) for item in value]
        if isinstance(value, str | float):
            raise _not_ids("a token id of the config", value)
        return new.get(value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    found = {key: named(value) if key.endswith(_NAMED) else value for key, value in config.items()}
    for key in _LISTS:
        if config.get(key) is not None:
            found[key] = [new[i] for i in _list_of_ids(key, config[key]) if i in new]
    for key in _SEQUENCES:
        if config.get(key) is not None:
            if not isinstance(config[key], list):
                raise _not_ids(key, config[key])
            listed = [_list_of_ids(key, ids) for ids in config[key]]
            found[key] = [[new[i] for i in ids] for ids in listed if all(i in new for i in ids)]
            if not found[key]:
                # Nothing is left to forbid, and transformers refuses a list of nothing.
                del found[key]
    return found


def _not_ids(key: str, value: object) -> CheckpointError:
    return CheckpointError(f"{key} is {value!r}, wanted a list of token ids, which could follow a cut vocabulary")


def _list_of_ids(key: str, value: object) -> list[int]:
    if not isinstance(value, list) or len(ids := list(_ids(value))) != len(value):
        raise _not_ids(key, value)
    return ids
