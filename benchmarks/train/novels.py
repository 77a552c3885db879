"""The sources of the language suites: Llamas of about a million parameters, pretrained on novels.

Everything is a function of the settings below and is cached outside the repository, under their hash.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anysize.io.whole import write_json
from anysize.progress import Progress
from anysize.training.optimizer_state import save_state
from benchmarks.measure import CACHE, DATA
from benchmarks.train.sources import Cost, cost_of, key_of

NOVELS = DATA / "novels"


@dataclass(frozen=True)
class Settings:
    """What the source is made of. Tokens of training, then of the arms, come one after the other."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 344
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    context: int = 128
    batch: int = 16
    steps: int = 2000
    rate: float = 3e-3
    weight_decay: float = 0.1
    train_characters: int = 40_000_000
    seed: int = 0

    def write_data(self, folder: Path) -> None:
        """Write train.parquet, of text that no source has been trained on, and validation.parquet and test.parquet."""
        _write_unseen(folder, self)

    def shorter(self, part: int) -> Settings:
        """Return the same with so small a part of the steps."""
        return replace(self, steps=self.steps // part)

    def made(self, progress: Progress) -> tuple[Path, Cost]:
        """Return the folder of the trained source, the state of its optimizer with it, and what its training took."""
        from transformers import LlamaConfig, LlamaForCausalLM

        del progress
        home = CACHE / f"source-{key_of(self)}"
        if not (home / "made.json").is_file():
            ids, tokenizer = _tokens(self)
            torch.manual_seed(self.seed)
            model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config(self).items() if k != "architectures"}))
            # The other half is for whoever grows or shrinks it.
            optimizer, seconds = _train(model, ids[: ids.numel() // 2], self)
            model.save_pretrained(home)
            save_state(model, optimizer, home)
            save_tokenizer(tokenizer, home)
            write_json(home / "made.json", {"cpu_s": seconds, "settings": asdict(self)})
        seconds = json.loads((home / "made.json").read_text(encoding="utf-8"))["cpu_s"]
        return home, cost_of(home, seconds, self.steps * self.batch * self.context, self.context)


def config(settings: Settings) -> dict[str, Any]:
    """Return the source's config."""
    sizes = {k: getattr(settings, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                               "num_attention_heads", "num_key_value_heads")}  # fmt: skip
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], **sizes, "tie_word_embeddings": True,
        "head_dim": settings.hidden_size // settings.num_attention_heads, "bos_token_id": 0, "eos_token_id": 0,
        "max_position_embeddings": 512,
    }  # fmt: skip


def _rows(split: str) -> list[str]:
    """Return the pieces of a split, from all books in one shuffled order that is always the same."""
    import pyarrow.parquet as parquet

    rows = parquet.read_table(NOVELS / f"{split}.parquet", columns=["text"]).column("text").to_pylist()
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def _text(split: str, characters: int) -> str:
    return "\n\n".join(_rows(split))[:characters]


def _write_unseen(folder: Path, settings: Settings) -> None:
    for split in ("train", "validation", "test"):
        rows = _rows(split)
        write_rows(folder / f"{split}.parquet", _halves(rows, settings)[1] if split == "train" else rows)


def _halves(rows: list[str], settings: Settings) -> tuple[list[str], list[str]]:
    """Return the rows that a source is trained on, or its tokenizer, and those that neither has seen."""
    ends = np.cumsum([len(row) + 2 for row in rows])
    seen = [end - len(row) <= settings.train_characters for row, end in zip(rows, ends, strict=True)]
    parted = list(zip(rows, seen, strict=True))
    return [row for row, known in parted if known], [row for row, known in parted if not known]


def seen_rows(settings: Settings) -> list[str]:
    """Return the pieces that a source of these settings may be trained on."""
    return _halves(_rows("train"), settings)[0]


def write_rows(place: Path, rows: list[str]) -> None:
    """Write a column of texts, once: a comparison knows its data by their times, too."""
    import pyarrow
    import pyarrow.parquet as parquet

    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_file():
        partial = place.with_suffix(".partial")
        parquet.write_table(pyarrow.table({"text": rows}), partial)
        partial.replace(place)


def save_tokenizer(place: Path, folder: Path) -> None:
    """Write a tokenizer of a file as transformers reads it."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(place), bos_token="<s>", eos_token="<s>").save_pretrained(folder)


def new_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Return a byte-level tokenizer trained on the beginning of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator(
        [text[:4_000_000]],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    return tokenizer


def _tokens(settings: Settings) -> tuple[torch.Tensor, Path]:
    """Return the token ids of the training books, int64, and the tokenizer's file; tokenized once and cached."""
    home = CACHE / f"novels-{settings.vocab_size}-{settings.train_characters}"
    place = home / "tokenizer.json"
    if not (home / "train.npy").is_file():
        home.mkdir(parents=True, exist_ok=True)
        text = _text("train", settings.train_characters)
        tokenizer = new_tokenizer(text, settings.vocab_size)
        tokenizer.save(str(place))
        pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
        ids = np.concatenate([np.array(e.ids, np.int16) for e in tokenizer.encode_batch(pieces)])
        partial = home / "partial.npy"
        np.save(partial, ids)
        partial.replace(home / "train.npy")
    return torch.from_numpy(np.load(home / "train.npy").astype(np.int64)), place


def _train(model: Any, ids: torch.Tensor, settings: Settings) -> tuple[torch.optim.Optimizer, float]:
    """Train a model on batches that the seed alone decides; return its optimizer and the processor seconds.

    AdamW (0.9, 0.95), 5 % warm-up, cosine to a tenth, norms not decayed, clip 1. Seconds are of the processor, not of
    the clock: other work on the machine does not count.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(settings.seed)
    model.train()
    begin = time.process_time()
    for step in range(settings.steps):
        done = step / settings.steps
        scale = min(1.0, (step + 1) / (0.05 * settings.steps)) * (0.1 + 0.45 * (1 + np.cos(np.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = settings.rate * scale
        starts = torch.randint(0, ids.numel() - settings.context, (settings.batch,), generator=generator)
        batch = torch.stack([ids[s : s + settings.context] for s in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, time.process_time() - begin
