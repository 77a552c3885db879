"""What names tokens by their ids beside a tokenizer: settings, templates and tokens that are added on loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import anysize
from anysize.axis import select
from anysize.config import understand
from anysize.errors import CheckpointError
from anysize.vocabulary.ids import renumbered, target_ids
from anysize.vocabulary.tokenizer_file import TokenizerFile
from tests.speaking import END, SPECIAL, WORDS


def test_tokens_that_only_the_settings_add_are_kept(speaking: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "source"
    shutil.copytree(speaking, source)
    place = source / "tokenizer.json"
    told = json.loads(place.read_text())
    # As older checkpoints have it: what was added last stands beside tokenizer.json.
    told["added_tokens"] = [token for token in told["added_tokens"] if token["id"] != END]
    place.write_text(json.dumps(told))
    (source / "added_tokens.json").unlink()
    plan = anysize.plan(source, keep_tokens=WORDS)
    assert plan.kept_tokens is not None
    assert END in plan.kept_tokens.index
    anysize.apply(plan, tmp_path / "out")
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    text = f"The cat{SPECIAL[2]}"
    assert before.tokenize(text)[-1] == after.tokenize(text)[-1] == SPECIAL[2]
    assert plan.kept_tokens.index[after.convert_tokens_to_ids(SPECIAL[2])] == END
    assert anysize.plan(source, keep_tokens=[*WORDS, SPECIAL[2]]).kept_tokens == plan.kept_tokens


def test_ids_that_transformers_would_fill_in_are_spelled_out() -> None:
    raw = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 24, "n_head": 3, "n_layer": 1, "n_positions": 9}
    axis = select(50257, [0, 7, 50256])
    told = target_ids(understand(raw), {**raw, "vocab_size": 3}, axis)
    assert (told["bos_token_id"], told["eos_token_id"]) == (2, 2)
    # An id that no token of the source has is left alone.
    assert "eos_token_id" not in target_ids(understand({**raw, "vocab_size": 90}), raw, select(90, [0, 7]))
    assert renumbered({"pad_token_id": -1, "eos_token_id": [7, 8]}, {7: 0, 8: 1}) == {
        "pad_token_id": -1, "eos_token_id": [0, 1]
    }  # fmt: skip


def test_settings_whose_ids_cannot_follow_are_named() -> None:
    with pytest.raises(CheckpointError, match="the generation config has sequence_bias, whose token ids cannot"):
        renumbered({"sequence_bias": [[[5], 1.0]]}, {5: 0})
    assert renumbered({"suppress_tokens": [5, 6], "bad_words_ids": [[5, 6], [5]]}, {5: 0}) == {
        "suppress_tokens": [0], "bad_words_ids": [[0]]
    }  # fmt: skip
    # transformers refuses to generate without any of an empty list.
    assert renumbered({"suppress_tokens": [6], "bad_words_ids": [[5, 6]]}, {5: 0}) == {"suppress_tokens": []}


def test_pairs_of_a_bert_processor_follow() -> None:
    from tokenizers import Tokenizer, models, processors

    tokenizer: Any = Tokenizer(
        models.WordPiece({"[UNK]": 0, "a": 1, "[SEP]": 2, "b": 3, "[CLS]": 4}, unk_token="[UNK]")
    )
    tokenizer.post_processor = processors.Sequence([processors.BertProcessing(("[SEP]", 2), ("[CLS]", 4))])
    file = TokenizerFile(tokenizer.to_str(), "it")
    assert file.always == {0, 2, 4}
    made = Tokenizer.from_str(file.cut({0: 0, 2: 1, 3: 2, 4: 3}))
    assert made.encode("b").ids == [3, 2, 1]
