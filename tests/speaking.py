"""A tiny llama that speaks: byte-level BPE learnt from a page, its special tokens last, and files of all kinds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from anysize.io.models import model_class, quiet_transformers
from anysize.recipe import Plan

PAGE = (
    "The cat sat on the mat and looked at the other cat. The other cat looked at the mat, and thought about the hat "
    "that the man had left there. Then the man came back and took the hat, and the cats chased one another. "
)
SIZE = 320
SPECIAL = ("<pad>", "<start>", "<end>")
PAD, START, END = SIZE, SIZE + 1, SIZE + 2


def byte_level() -> Tokenizer:
    """The tokenizer: SIZE tokens of bytes and merges, then the special ones."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([PAGE], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A", special_tokens=[("<start>", START)])
    tokenizer.enable_padding(pad_id=PAD, pad_token="<pad>")
    return tokenizer


def make_speaking(folder: Path, new_llama: Callable[..., Path], **changes: Any) -> Path:
    """Write the llama with this tokenizer, in new and old forms, and settings that name ids."""
    ids = {"bos_token_id": START, "eos_token_id": [END, PAD], "pad_token_id": PAD}
    new_llama(folder, **{"vocab_size": SIZE + 3, **ids, **changes})
    tokenizer = byte_level()
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab = tokenizer.get_vocab()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<start>", "eos_token": "<end>",
        "pad_token": {"content": "<pad>", "__type": "AddedToken"}, "chat_template": "{{ messages }}",
        "added_tokens_decoder": {str(SIZE + i): {"content": t, "special": True} for i, t in enumerate(SPECIAL)},
    }  # fmt: skip
    generation = {**ids, "suppress_tokens": [vocab["Ġcat"], END], "bad_words_ids": [[vocab["Ġcat"]], [0, END]]}
    for name, content in {
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
        "added_tokens.json": {token: SIZE + i for i, token in enumerate(SPECIAL)},
        "special_tokens_map.json": {"bos_token": "<start>", "eos_token": "<end>"},
        "vocab.json": vocab,
    }.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer.model").write_bytes(b"old ids")
    (folder / "LICENSE").write_text("free")
    return folder


BYTES = 256
WORDS = ["Ġcat", "Ġthe", "Ġlooked"]
VOCAB = byte_level().get_vocab()


def kept_of(plan: Plan) -> list[int]:
    """The ids that a plan keeps, in their new order."""
    assert plan.kept_tokens is not None
    return plan.kept_tokens.index.tolist()


def in_memory(folder: Path) -> Any:
    """The model of a folder, loaded."""
    with quiet_transformers():
        return model_class("LlamaForCausalLM").from_pretrained(folder).eval()


def written(folder: Path, name: str, content: object) -> Path:
    """The path of a new file with this text, or with this as JSON."""
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
