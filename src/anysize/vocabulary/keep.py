"""Choose the tokens that stay: those listed or seen, those nothing works without, and those they are made of."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from anysize.axis import AxisMap, select
from anysize.config import SourceConfig
from anysize.errors import CheckpointError, InputError, SizeError, joined
from anysize.io.reader import Checkpoint, TensorSource
from anysize.progress import Progress
from anysize.target import is_number
from anysize.vocabulary.ids import default_ids, named_ids, new_ids, renumbered
from anysize.vocabulary.tokenizer_file import TOKENIZER, TokenizerFile
from anysize.vocabulary.wish import Wish, counted, ids_of, listed

# Tokenizers that only code can read, or that AutoTokenizer turns into a tokenizer.json.
_OTHER_KINDS = ("*.model", "*.tiktoken", "vocab.json", "vocab.txt", "merges.txt", "tokenizer_config.json")


@dataclass(frozen=True)
class KeptTokens:
    """The choice: the map of `vocab`, the hash of the tokenizer it was made for ("" where there is none), and notes."""

    axis: AxisMap
    tokenizer_sha256: str
    notes: tuple[str, ...] = ()


def json_object(path: Path) -> dict[str, Any]:
    """Return a JSON object beside a checkpoint, empty where there is no file; raise CheckpointError where damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{path}': {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' holds a {type(found).__name__}, wanted a JSON object")
    return found


def tokenizer_sha256(tensors: TensorSource) -> str:
    """Return the hash of the tokenizer.json beside a source, "" where there is none."""
    path = tensors.folder / TOKENIZER if isinstance(tensors, Checkpoint) else None
    return hashlib.sha256(path.read_bytes()).hexdigest() if path is not None and path.is_file() else ""


class Vocabulary:
    """The tokens of one source. Raises CheckpointError where its tokenizer is of a kind that cannot be cut."""

    def __init__(self, tensors: TensorSource, config: SourceConfig) -> None:
        if "vocab" not in config.sizes:
            raise SizeError(f"keep_tokens: a {config.architecture.model_type} has no vocab axis")
        self.size = config.sizes["vocab"]
        self.folder = tensors.folder if isinstance(tensors, Checkpoint) else None
        self.location = tensors.location
        self.generation = self._generation(tensors)
        self._named = named_ids({**default_ids(config), **config.raw}) | named_ids(self.generation)
        self.tokenizer = self._tokenizer()
        if self.tokenizer is not None and (highest := max(self.tokenizer.tokens.values(), default=0)) >= self.size:
            raise CheckpointError(
                f"the tokenizer of '{self.location}' has id {highest}, the model has {self.size} tokens: this "
                "tokenizer is not the model's"
            )

    def _generation(self, tensors: TensorSource) -> Mapping[str, Any]:
        if self.folder is not None:
            return json_object(self.folder / "generation_config.json")
        model = getattr(tensors, "model", None)
        generation = getattr(model, "generation_config", None)
        return {} if generation is None else generation.to_dict()

    def _tokenizer(self) -> TokenizerFile | None:
        if self.folder is None:
            return None
        path = self.folder / TOKENIZER
        if path.is_file():
            try:
                return TokenizerFile(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(f"cannot read '{path}': {error}") from error
        others = sorted({found.name for pattern in _OTHER_KINDS for found in self.folder.glob(pattern)})
        if others:
            raise CheckpointError(
                f"'{self.location}' has its tokenizer as {joined(others)}, and tokens can be cut from a {TOKENIZER} "
                f"only: make one with AutoTokenizer.from_pretrained('{self.location}').save_pretrained(...)"
            )
        return None

    @property
    def tokens(self) -> Mapping[str, int] | None:
        """Token -> id, None where there is no tokenizer."""
        return None if self.tokenizer is None else self._added | self.tokenizer.tokens

    @cached_property
    def _added(self) -> dict[str, int]:
        """Token -> id of what is named beside tokenizer.json: transformers adds those tokens when it loads it."""
        if self.folder is None:
            return {}
        table = json_object(self.folder / "tokenizer_config.json").get("added_tokens_decoder")
        found = {
            token["content"]: int(i)
            for i, token in (table if isinstance(table, dict) else {}).items()
            if str(i).isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str)
        }
        more = json_object(self.folder / "added_tokens.json")
        found |= {token: i for token, i in more.items() if is_number(i, int)}
        return {token: i for token, i in found.items() if 0 <= i < self.size}

    @cached_property
    def always(self) -> set[int]:
        """The ids that no cut takes away."""
        found = {i for i in self._named if i < self.size}
        if self.tokenizer is not None and self.folder is not None:
            settings = json_object(self.folder / "tokenizer_config.json")
            names = _special_names(settings) | _special_names(json_object(self.folder / "special_tokens_map.json"))
            found |= self.tokenizer.always | {
                i for t, i in (self.tokens or {}).items() if t in names or t in self._added
            }
        return self.closed(found)

    def closed(self, ids: set[int]) -> set[int]:
        """Return these ids with everything that they cannot do without."""
        return set(ids) if self.tokenizer is None else self.tokenizer.closed(ids)

    def most_frequent(self, counts: Counter[int], size: int) -> set[int]:
        """Return exactly `size` ids: those always kept, then tokens by count with their parts, ties to the lower id."""
        assert self.tokenizer is not None
        kept = set(self.always)
        if len(kept) > size:
            raise SizeError(
                f"vocab_size={size}: {len(kept)} tokens are always kept (special, added and byte tokens, and what the "
                f"config names); ask for at least {len(kept)}"
            )
        for token in sorted(self.tokenizer.tokens.values(), key=lambda i: (-counts[i], i)):
            more = self.tokenizer.parts(token) - kept
            if len(kept) + len(more) <= size:
                kept |= more
        if len(kept) < size:
            raise SizeError(f"vocab_size={size}: the tokenizer has {len(kept)} tokens, the other rows are of no token")
        return kept


def _special_names(settings: Mapping[str, Any]) -> set[str]:
    """Return the tokens that a tokenizer's settings name (`bos_token` and its like, plain or as objects)."""
    found: set[str] = set()
    for key, value in settings.items():
        if key.endswith(("_token", "special_tokens")):
            for item in value if isinstance(value, list) else value.values() if _is_table(value) else [value]:
                content = item.get("content") if isinstance(item, dict) else item
                found |= {content} if isinstance(content, str) else set()
    return found


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and "content" not in value


def kept_tokens(
    tensors: TensorSource,
    config: SourceConfig,
    wish: Wish,
    vocab_size: int | None,
    progress: Progress,
    column: str = "",
) -> KeptTokens:
    """Return the choice that a user's wish stands for: a token list, or text of which `vocab_size` tokens are kept.

    `column` is the column that the text is in, where there are several.

    Raises InputError for a list or text that cannot be used, SizeError for a size that cannot be, CheckpointError for a
    tokenizer that cannot be cut.
    """
    vocabulary = Vocabulary(tensors, config)
    if vocab_size is not None and not (is_number(vocab_size, int) and 1 <= vocab_size < vocabulary.size):
        raise SizeError(
            f"vocab_size={vocab_size!r}: keep_tokens takes tokens away, so wanted less than the source's "
            f"{vocabulary.size}"
        )
    found = listed(wish, vocabulary.tokens)
    if vocabulary.tokenizer is None and (found is None or isinstance(found[0], str)):
        what = "text" if found is None else "token strings"
        raise InputError(f"keep_tokens: '{vocabulary.location}' has no tokenizer for {what}: list token ids")
    if found is not None:
        if vocab_size is not None:
            raise SizeError("keep_tokens lists the tokens, and vocab_size chooses among those of a text: give one")
        asked = ids_of(found, vocabulary.tokens, vocabulary.size)
        what, kept = "listed", vocabulary.closed(asked | vocabulary.always)
    else:
        counts = counted(str(wish), str(vocabulary.folder), vocabulary.size, progress, column)
        asked = set(counts)
        what = f"seen in {counts.total():,} tokens of '{wish}'"
        kept = vocabulary.closed(asked | vocabulary.always) if vocab_size is None else vocabulary.most_frequent(
            counts, vocab_size)  # fmt: skip
    if len(kept) == vocabulary.size:
        raise SizeError(f"keep_tokens keeps all {vocabulary.size} tokens of the source, so it changes nothing")
    axis = select(vocabulary.size, sorted(kept))
    renumbered(vocabulary.generation, new_ids(axis))  # what cannot follow is refused now, not once all is made
    always = len(vocabulary.always - asked)
    rest = len(kept - asked - vocabulary.always)
    note = f"tokens: {len(kept):,} of {vocabulary.size:,} are kept: {len(kept & asked):,} {what}"
    note += "" if kept >= asked else f" (of {len(asked):,})"
    note += f", {always:,} more that are always kept, {rest:,} more that "
    note += "they are made of" if vocab_size is None else "they are made of or that come next"
    return KeptTokens(axis, tokenizer_sha256(tensors), (note,))


def kept_again(tensors: TensorSource, config: SourceConfig, axis: AxisMap) -> KeptTokens:
    """Return the choice that a plan carries, held against its source; raise CheckpointError where it is no choice."""
    vocabulary = Vocabulary(tensors, config)
    kept = set(axis.index.tolist())
    if axis.index.tolist() != sorted(kept) or -1 in kept:
        raise CheckpointError("the kept tokens are not in ascending order, each of them once")
    if lacking := sorted(vocabulary.closed(kept | vocabulary.always) - kept):
        raise CheckpointError(f"the kept tokens lack {joined(map(str, lacking[:5]))}, which the tokenizer cannot miss")
    return KeptTokens(axis, tokenizer_sha256(tensors))
