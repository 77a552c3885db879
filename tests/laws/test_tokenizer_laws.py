"""A cut tokenizer says the same of text made of kept tokens, and byte-level ones lose no text whatever is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from anysize.vocabulary.tokenizer_file import TokenizerFile

LETTERS = "abc"
words = st.text(LETTERS, min_size=2, max_size=5)


def text_of(tokens: Iterable[str]) -> st.SearchStrategy[str]:
    """Text in which these tokens are likely to come up."""
    return st.lists(st.sampled_from([" ", *LETTERS, *(t.removeprefix("##") for t in tokens)]), max_size=9).map("".join)


@st.composite
def merges(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges of any order, among them several ways to the same token."""
    tokens, found = list(LETTERS), []
    for _ in range(draw(st.integers(1, 14))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in found:
            found.append(pair)
            tokens.append("".join(pair))
    return found


def bpe(found: list[tuple[str, str]]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(dict.fromkeys([" ", *LETTERS, *(a + b for a, b in found)]))}
    return Tokenizer(models.BPE(vocab, found))


def unigram(scored: dict[str, float]) -> Tokenizer:
    pieces = [("<unk>", 0.0), *((letter, -9.0) for letter in LETTERS), *scored.items()]
    return Tokenizer(models.Unigram(pieces, 0, byte_fallback=False))


def wordpiece(found: list[str]) -> Tokenizer:
    letters = [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["[UNK]", *letters, *found]))}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return tokenizer


def cut(tokenizer: Tokenizer, asked: set[int]) -> tuple[Tokenizer, dict[int, int]]:
    """The tokenizer with what is asked for and what that needs, and old id -> new id."""
    file = TokenizerFile(tokenizer.to_str(), "it")
    kept = sorted(file.closed(asked | file.always))
    new = {old: i for i, old in enumerate(kept)}
    return Tokenizer.from_str(file.cut(new)), new


def same_of_kept(tokenizer: Tokenizer, asked: set[int], text: str) -> bool:
    """Whether a text is of kept tokens alone, which must then come out as before."""
    made, new = cut(tokenizer, asked)
    assert {token: new[i] for token, i in tokenizer.get_vocab().items() if i in new} == made.get_vocab()
    before = tokenizer.encode(text)
    if not set(before.ids) <= new.keys():
        return False
    after = made.encode(text)
    assert after.tokens == before.tokens
    assert after.ids == [new[i] for i in before.ids]
    return True


subsets = st.sets(st.integers(0, 17))


@given(merges(), subsets, st.data())
def test_byte_pairs_merge_as_before(found: list[tuple[str, str]], asked: set[int], data: st.DataObject) -> None:
    text = data.draw(text_of(a + b for a, b in found))
    tokenizer = bpe(found)
    size = tokenizer.get_vocab_size()
    used = set(tokenizer.encode(text).ids)
    same_of_kept(tokenizer, {i % size for i in asked}, text)
    # What the text itself is made of can always be kept.
    assert same_of_kept(tokenizer, used, text)


# Scores that sums and files keep to the last bit: tokenizers reads others back with one bit changed, and a tie between
# two segmentations then falls the other way, cut or not.
exact = st.integers(-12 * 64, -7).map(lambda n: n / 64)


@given(st.dictionaries(words, exact, max_size=9), subsets, st.data())
def test_the_best_segmentation_stays_the_best(scored: dict[str, float], asked: set[int], data: st.DataObject) -> None:
    text = data.draw(text_of(scored))
    tokenizer = unigram(scored)
    size = tokenizer.get_vocab_size()
    same_of_kept(tokenizer, {i % size for i in asked}, text)
    assert same_of_kept(tokenizer, set(tokenizer.encode(text).ids), text)


def test_an_unknown_character_costs_what_it_did() -> None:
    """Its cost follows from the lowest score, so that token stays: else "a" unknown and "bcd" would be the cheaper."""
    scores = {"<unk>": 0.0, "ab": -20.0, "c": -20.0, "d": -20.0, "bcd": -1.0, "zz": -60.0}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), 0, byte_fallback=False))
    assert tokenizer.encode("abcd").tokens == ["ab", "c", "d"]
    assert same_of_kept(tokenizer, {1, 2, 3, 4}, "abcd")


@given(st.lists(words.flatmap(lambda w: st.sampled_from([w, f"##{w}"])), max_size=9), subsets, st.data())
def test_the_longest_piece_stays_the_longest(found: list[str], asked: set[int], data: st.DataObject) -> None:
    text = data.draw(text_of(found))
    tokenizer = wordpiece(found)
    size = tokenizer.get_vocab_size()
    same_of_kept(tokenizer, {i % size for i in asked}, text)
    assert same_of_kept(tokenizer, set(tokenizer.encode(text).ids), text)
    # Words of the letters of what is kept are spelled, whatever is cut.
    made, _ = cut(tokenizer, {tokenizer.token_to_id(piece) for piece in found})
    letters = {letter for piece in found for letter in piece.removeprefix("##")}
    assert "[UNK]" not in made.encode("".join(c for c in text if c in letters | {" "})).tokens


def byte_level(trained_on: str) -> Tokenizer:
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([trained_on], trainer)
    return tokenizer


def byte_fallback(trained_on: str) -> Tokenizer:
    pieces = {f"<0x{byte:02X}>": byte for byte in range(256)}
    found = [(a, b) for a, b in itertools.pairwise(trained_on)]
    found = list(dict.fromkeys(found))[:40]
    for token in [*trained_on, *(a + b for a, b in found)]:
        pieces.setdefault(token, len(pieces))
    tokenizer = Tokenizer(models.BPE(pieces, found, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


PROSE = "the cat sat on the mat, and the other cats that sat there then chatted about the hat. " * 3
KINDS = {"bytes": byte_level(PROSE), "fallback": byte_fallback("the cat▁sat on▁the mat")}


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40), asked=st.sets(st.integers(0, 255), max_size=12))
def test_no_text_is_lost_to_bytes(kind: str, text: str, asked: set[int]) -> None:
    tokenizer = KINDS[kind]
    made, _ = cut(tokenizer, {i % tokenizer.get_vocab_size() for i in asked})
    assert made.decode(made.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    if kind == "bytes":
        assert made.decode(made.encode(text).ids) == text


def test_the_parts_of_a_token_are_those_that_its_characters_take() -> None:
    """Of two ways to a token the one that comes up counts, and without any the token is not reached."""
    found = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]
    tokenizer = bpe(found)
    file = TokenizerFile(tokenizer.to_str(), "it")
    wrong = {" ", *LETTERS, "ab", "abc"}
    new = {old: i for i, old in enumerate(sorted(file.tokens[token] for token in wrong))}
    assert Tokenizer.from_str(file.cut(new)).encode("abc").tokens == ["abc"]
    del new[file.tokens["ab"]]
    assert Tokenizer.from_str(file.cut({old: i for i, old in enumerate(new)})).encode("abc").tokens == list(LETTERS)
    assert file.closed({file.tokens["abc"]}) == {file.tokens[t] for t in (*LETTERS, "bc", "abc")}
