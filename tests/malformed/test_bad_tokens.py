"""Tokens that cannot be kept, and tokenizers that cannot be cut: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.speaking import BYTES, SIZE, WORDS, in_memory, kept_of, make_speaking, written

import anysize
from anysize.api import apply_with_proof
from anysize.config import understand
from anysize.errors import CheckpointError, InputError, SizeError
from anysize.vocabulary.keep import kept_tokens

Run = Callable[..., Any]

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown string": ({"keep_tokens": ["Ġcat", "Ġdog"]}, "the tokenizer has no token 'Ġdog'"),
    "a string with a space": ({"keep_tokens": [" cat"]}, "has no token ' cat' (did you mean 'Ġcat'?)"),
    "an unknown id": ({"keep_tokens": [5, 999, -1]}, "unknown token id -1; 999: the tokenizer has no such token"),
    "an empty list": ({"keep_tokens": []}, "keep_tokens is an empty token list: name at least one token to keep"),
    "a mixture": ({"keep_tokens": [5, "Ġcat"]}, "keep_tokens is a list of int and str: wanted token ids or token"),
    "truths": ({"keep_tokens": [True]}, "keep_tokens is a list of bool: wanted token ids or token strings"),
    "a number": ({"keep_tokens": 5}, "keep_tokens=5: wanted a list of tokens, a file with one, or text"),
    "all of them": ({"keep_tokens": range(SIZE + 3)}, f"keep_tokens keeps all {SIZE + 3} tokens of the source, so it"),
    "a size for a list": (
        {"keep_tokens": WORDS, "vocab_size": 300},
        "keep_tokens lists the tokens, and vocab_size chooses among those of a text: give one",
    ),
    "a larger size": ({"keep_tokens": WORDS, "vocab_size": 400}, "vocab_size=400: keep_tokens takes tokens away, so"),
    "padding": ({"keep_tokens": WORDS, "pad_vocab_to_multiple_of": 64}, "pad_vocab_to_multiple_of adds rows and keep"),
    "a preset": ({"keep_tokens": WORDS, "preset": "minitron"}, "preset 'minitron': only tokens are cut, and keep_to"),
    "a score": ({"keep_tokens": WORDS, "select": "random"}, "select 'random': no width is below the source's, so"),
    "data that are gone": ({"keep_tokens": "no/such/file.txt"}, "the data 'no/such/file.txt' do not exist"),
    "a list that is gone": ({"keep_tokens": "no/such.tokens"}, "cannot read the token list 'no/such.tokens'"),
    "no list, but a size": ({"vocab_size": 300}, "name those to keep (--keep-tokens)"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_kept_is_one_sentence(speaking: Path, name: str) -> None:
    options, sentence = BAD[name]
    with pytest.raises((InputError, SizeError)) as refusal:
        anysize.plan(speaking, **options)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


FILES: dict[str, tuple[str, object, str]] = {
    "a vocabulary": ("vocab.json", {"Ġcat": 1}, "vocab.json' is a vocabulary (token -> id), not a list: name the"),
    "an empty list": ("none.json", [], "none.json' is an empty token list"),
    "an empty file": ("none.tokens", "\n\n", "none.tokens' is an empty token list"),
    "a list named as text": ("words.txt", "Ġcat\nĠthe\nĠlookd", "words.txt' may be text or a token list (2 of its 3"),
    "empty text": ("none.txt", "", "none.txt' hold no token"),
    "no text at all": ("table.jsonl", '{"number": 1}\n', "table.jsonl' have no text column"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_says_nothing_is_refused(speaking: Path, tmp_path: Path, cli: Run, name: str) -> None:
    file, content, sentence = FILES[name]
    path = written(tmp_path, file, content)
    ran = cli("resize", speaking, tmp_path / "out", "--keep-tokens", path)
    assert ran.code == 2
    told = [line for line in ran.err.splitlines() if line.startswith("anysize: ")]
    assert len(told) == 1
    assert sentence in told[0]
    assert [p.name for p in tmp_path.iterdir()] == [file]


def test_a_size_below_what_is_always_kept_names_the_least(speaking: Path, page: Path) -> None:
    with pytest.raises(SizeError, match=f"vocab_size=100: {BYTES + 3} tokens are always kept .*ask for at least 259"):
        anysize.plan(speaking, keep_tokens=page, vocab_size=100)
    assert len(kept_of(anysize.plan(speaking, keep_tokens=page, vocab_size=BYTES + 3))) == BYTES + 3


def test_images_have_no_tokens() -> None:
    source = tiny.source(tiny.Variant("vit", "bias"))
    with pytest.raises(SizeError, match="keep_tokens: a vit has no vocab axis"):
        kept_tokens(source, understand(source.config), [1], None, lambda *_: None)


def test_strings_and_text_need_a_tokenizer(speaking: Path, page: Path, tmp_path: Path, new_llama: Run) -> None:
    bare = new_llama(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    for source, wish, what in (
        (bare, page, "text"),
        (bare, ["w5"], "token strings"),
        (in_memory(speaking), page, "te"),
    ):
        with pytest.raises(InputError, match=f"has no tokenizer for {what}.*: list token ids"):
            anysize.plan(source, keep_tokens=wish)
    _, proof = apply_with_proof(anysize.plan(bare, keep_tokens=[5, 9]), tmp_path / "out")
    assert proof.passed
    assert "the source has no tokenizer: cut yours to the kept tokens" in proof.notes
    with pytest.raises(InputError, match="unknown token id 61: the model has ids 0-60"):
        anysize.plan(bare, keep_tokens=[61])


@pytest.mark.parametrize("names", [["tokenizer.model"], ["vocab.json", "merges.txt"], ["vocab.txt"]])
def test_a_tokenizer_in_another_form_is_named_with_the_way_out(
    tmp_path: Path, new_llama: Run, names: list[str]
) -> None:
    source = new_llama(tmp_path / "source")
    for path in source.glob("tokenizer*"):
        path.unlink()
    for name in names:
        (source / name).write_text("")
    with pytest.raises(CheckpointError) as refusal:
        anysize.plan(source, keep_tokens=[5])
    assert f"has its tokenizer as {'; '.join(sorted(names))}, and tokens can be cut" in str(refusal.value)
    assert f"AutoTokenizer.from_pretrained('{source}').save_pretrained(" in str(refusal.value)


def test_settings_that_cannot_follow_are_refused_before_anything_is_made(tmp_path: Path, new_llama: Run) -> None:
    source = make_speaking(tmp_path / "source", new_llama)
    written(source, "generation_config.json", {"sequence_bias": [[[5], 1.0]]})
    with pytest.raises(CheckpointError, match="the generation config has sequence_bias, whose token ids cannot follow"):
        anysize.plan(source, keep_tokens=WORDS)


TOKENIZERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "not JSON": (lambda _: "{", "is no tokenizer that can be read"),
    "of no kind": (lambda raw: {**raw, "model": {"type": "Odd"}}, "is no tokenizer that can be read"),
    "of a larger model": (
        lambda raw: {**raw, "added_tokens": [{**raw["added_tokens"][0], "id": SIZE + 3, "content": "<more>"}]},
        "tokens: this tokenizer is not the model's",
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, new_llama: Run, name: str) -> None:
    source = make_speaking(tmp_path / "source", new_llama, vocab_size=SIZE)
    spoil, why = TOKENIZERS[name]
    found = spoil(json.loads((source / "tokenizer.json").read_text()))
    (source / "tokenizer.json").write_text(found if isinstance(found, str) else json.dumps(found))
    with pytest.raises(CheckpointError, match=why):
        anysize.plan(source, keep_tokens=[5])
