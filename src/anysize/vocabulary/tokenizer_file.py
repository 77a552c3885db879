"""A tokenizer.json as data: its tokens, what each of them cannot do without, and the same file with fewer of them.

Kept tokens stand in their old order, so the first new id belongs to the lowest old one; nothing else is assumed of ids.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anysize.axis import AxisMap
from anysize.errors import CheckpointError
from anysize.vocabulary.ids import new_ids
from anysize.vocabulary.merges import Merges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What it is called beside a checkpoint.
TOKENIZER = "tokenizer.json"
_KINDS = ("BPE", "WordPiece", "Unigram", "WordLevel")


def _bytes_as_characters() -> set[str]:
    """Return the 256 characters in which byte-level tokenizers spell bytes (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return {chr(byte) for byte in plain} | {chr(256 + i) for i in range(256 - len(plain))}


def _components(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a normalizer, pre-tokenizer, post-processor or decoder and, where it is a sequence, what it is made of."""
    if isinstance(part, dict):
        yield part
        for name in ("normalizers", "pretokenizers", "processors", "decoders"):
            for inner in part.get(name, ()):
                yield from _components(inner)


def _marks(part: Mapping[str, Any]) -> Iterator[str]:
    """Yield the strings that a step of a tokenizer puts in or takes out ("▁")."""
    pattern = part.get("pattern")
    for value in (part.get("replacement"), part.get("content"), part.get("prepend"),
                  pattern.get("String") if isinstance(pattern, dict) else None):  # fmt: skip
        if isinstance(value, str):
            yield value


class TokenizerFile:
    """One tokenizer in the form that `tokenizers` writes. Raises CheckpointError for a kind that cannot be cut."""

    def __init__(self, text: str, origin: str) -> None:
        from tokenizers import Tokenizer  # noqa: PLC0415

        try:
            # Older files leave out what newer ones say: read as the library reads them.
            self.raw: dict[str, Any] = json.loads(Tokenizer.from_str(text).to_str())
        except Exception as error:  # tokenizers raises bare exceptions
            raise CheckpointError(f"'{origin}' is no tokenizer that can be read: {error}") from error
        self.origin = origin
        self.model: dict[str, Any] = self.raw["model"]
        self.kind: str = self.model["type"]
        if self.kind not in _KINDS:
            raise CheckpointError(f"'{origin}' is a {self.kind} tokenizer, and tokens are cut from {', '.join(_KINDS)}")
        self.added: dict[str, int] = {token["content"]: token["id"] for token in self.raw["added_tokens"]}
        for part in _components(self.raw["post_processor"]):
            if part["type"] not in ("Sequence", "ByteLevel", "TemplateProcessing", "BertProcessing",
                                    "RobertaProcessing"):  # fmt: skip
                raise CheckpointError(f"'{origin}' has a post-processor {part['type']}, which is not understood")

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Token -> id, without the added tokens."""
        if self.kind == "Unigram":
            return {token: i for i, (token, _) in enumerate(self.model["vocab"])}
        return self.model["vocab"]

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> id of every token."""
        return {**self.vocab, **self.added}

    @cached_property
    def names(self) -> dict[int, str]:
        """Id -> token."""
        return {i: token for token, i in self.tokens.items()}

    @cached_property
    def merges(self) -> Merges | None:
        """The merges of a BPE model."""
        if self.kind != "BPE":
            return None
        prefix, suffix = (self.model[f"{name}"] or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
        return Merges([(a, b) for a, b in self.model["merges"]], prefix=prefix, suffix=suffix)

    @cached_property
    def always(self) -> frozenset[int]:
        """The ids that no cut takes away: added and unknown tokens, bytes, and what padding and templates name."""
        found = set(self.added.values())
        found |= {self.tokens[t] for t in [self.model.get("unk_token")] if t in self.tokens}
        found |= {i for i in [self.model.get("unk_id")] if i is not None}
        steps = [p for name in ("normalizer", "pre_tokenizer", "decoder") for p in _components(self.raw[name])]
        kinds = {part["type"] for part in steps}
        alphabet = _bytes_as_characters() if "ByteLevel" in kinds else set[str]()
        if self.model.get("byte_fallback"):
            alphabet |= {f"<0x{byte:02X}>" for byte in range(256)}
            # A mark that stands for a space is not turned back into one once it is spelled in bytes.
            alphabet |= {mark for part in steps for mark in _marks(part)}
        found |= {self.vocab[token] for token in alphabet if token in self.vocab}
        if self.kind == "Unigram" and self.vocab:
            # What an unknown character costs follows from the lowest score.
            found.add(min(range(len(self.vocab)), key=lambda i: self.model["vocab"][i][1]))

        def name(i: int) -> int:
            found.add(i)
            return i

        _renumber(copy.deepcopy(self.raw), name)
        return frozenset(found)

    def parts(self, token_id: int) -> set[int]:
        """Return the ids that a token cannot do without, its own included.

        BPE: what its characters merge into on the way. WordPiece and Unigram: its characters, so that a word whose
        pieces are cut can still be spelled.
        """
        token = self.names.get(token_id)
        if token is None or token in self.added or self.kind == "WordLevel":
            return {token_id}
        if self.merges is not None:
            found = self.merges.parts(token)
        else:
            prefix = self.model.get("continuing_subword_prefix") or ""
            letters = set(token.removeprefix(prefix))
            found = letters | {prefix + letter for letter in letters}
        return {token_id} | {self.vocab[part] for part in found if part in self.vocab}

    def closed(self, ids: set[int]) -> set[int]:
        """Return these ids with everything that they cannot do without."""
        return {part for token_id in ids for part in self.parts(token_id)}

    def cut(self, new: Mapping[int, int]) -> str:
        """Return the text of the tokenizer.json that has only the tokens in `new`, under their new ids (old -> new).

        What tokenizes into kept tokens tokenizes as before: of the choices a tokenizer has, only others are taken away.
        """
        raw = copy.deepcopy(self.raw)
        if self.kind == "Unigram":
            raw["model"]["vocab"] = [entry for i, entry in enumerate(self.model["vocab"]) if i in new]
            if self.model["unk_id"] is not None:
                raw["model"]["unk_id"] = new[self.model["unk_id"]]
        else:
            kept = sorted((new[i], token) for token, i in self.vocab.items() if i in new)
            raw["model"]["vocab"] = {token: i for i, token in kept}
        if self.merges is not None:
            raw["model"]["merges"] = [list(merge) for merge in self.merges.among(raw["model"]["vocab"])]
        _renumber(raw, new.__getitem__)
        return json.dumps(raw, ensure_ascii=False, indent=2) + "\n"


def _renumber(raw: dict[str, Any], new: Callable[[int], int]) -> None:
    """Replace, in place, the ids that a tokenizer.json holds outside of its model."""
    for token in raw["added_tokens"]:
        token["id"] = new(token["id"])
    if raw["padding"] is not None:
        raw["padding"]["pad_id"] = new(raw["padding"]["pad_id"])
    for part in _components(raw["post_processor"]):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new(i) for i in token["ids"]]
        for side in ("sep", "cls"):
            if side in part:
                part[side] = [part[side][0], new(part[side][1])]


def cut_tokenizer(tokenizer: PreTrainedTokenizerBase, axis: AxisMap) -> PreTrainedTokenizerBase:
    """Return a loaded tokenizer with the tokens that a map of `vocab` keeps, under their new ids."""
    from tokenizers import Tokenizer  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    loaded: Any = tokenizer
    file, new = TokenizerFile(loaded.backend_tokenizer.to_str(), tokenizer.name_or_path), new_ids(axis)
    # transformers adds what tokenizer_config.json alone names, under ids that no cut has heard of.
    file.raw["added_tokens"] = [token for token in file.raw["added_tokens"] if token["id"] in new]
    text = file.cut(new)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token=tokenizer.eos_token)
