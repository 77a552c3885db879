"""The sources of the language suites: Llamas of about a million parameters, pretrained on novels.

Everything is a function of the settings below and is cached outside the repository, under their hash.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anysize.progress import Progress
from anysize.training.distill import distilled, kl_divergence
from anysize.training.optimizer_state import save_state
from benchmarks.measure import CACHE, DATA

# Half of the loss is the divergence from the teacher; nine tenths are better (benchmarks/train, docs/log.md).
TEACHER_WEIGHT = 0.5
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

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def examples(self) -> int:
        """How many tokens it is trained on."""
        return self.steps * self.batch * self.context

    def write_data(self, folder: Path) -> None:
        """Write train.parquet, of text that no source has been trained on, and validation.parquet and test.parquet."""
        _write_unseen(folder, self)

    def source(self, progress: Progress) -> tuple[Path, float]:
        """Return the folder of the trained source, and the processor seconds that it took; a finished one at once."""
        del progress
        home, made = source(self)
        return home, made["cpu_s"]


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
    import pyarrow
    import pyarrow.parquet as parquet

    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        rows = _rows(split)
        if split == "train":
            ends = np.cumsum([len(row) + 2 for row in rows])
            rows = [row for row, end in zip(rows, ends, strict=True) if end - len(row) > settings.train_characters]
        # Written once: a comparison knows its data by their times, too.
        place = folder / f"{split}.parquet"
        if not place.is_file():
            partial = place.with_suffix(".partial")
            parquet.write_table(pyarrow.table({"text": rows}), partial)
            partial.replace(place)


def _tokenizer(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.train_from_iterator(
        [text[:4_000_000]],
        trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<s>"], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    return tokenizer


def tokens(settings: Settings) -> dict[str, torch.Tensor]:
    """Return the token ids of each split, int64; tokenized once and cached."""
    home = CACHE / f"novels-{settings.vocab_size}-{settings.train_characters}"
    sizes = {"train": settings.train_characters, "validation": 600_000, "test": 600_000}
    if not (home / "test.npy").is_file():
        home.mkdir(parents=True, exist_ok=True)
        train = _text("train", sizes["train"])
        tokenizer = _tokenizer(train, settings.vocab_size)
        tokenizer.save(str(home / "tokenizer.json"))
        for split, size in sizes.items():
            text = train if split == "train" else _text(split, size)
            pieces = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
            ids = [np.array(e.ids, np.int16) for e in tokenizer.encode_batch(pieces)]
            np.save(home / f"{split}.npy", np.concatenate(ids))
    return {split: torch.from_numpy(np.load(home / f"{split}.npy").astype(np.int64)) for split in sizes}


def train(
    model: Any, ids: torch.Tensor, settings: Settings, *, steps: int, rate: float, weight_decay: float, seed: int,
    evaluate: dict[int, Any], budget: int | None = None, teacher: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Train a model for so many steps on batches that the seed alone decides; return losses at the asked steps.

    Seconds are of the processor, not of the clock: other work on the machine does not count.

    With a teacher, half of the loss is the KL to it. AdamW (0.9, 0.95), 5 % warm-up, cosine to a tenth over `budget`
    (or `steps`) steps, norms not decayed, clip 1.
    """
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed)
    whole = budget or steps
    found: dict[int, float] = {}
    spent = 0.0
    for step in range(steps + 1):
        if step in evaluate:
            model.eval()
            found[step] = evaluate[step](model)
            model.train()
        if step == steps:
            break
        begin = time.process_time()
        done = step / whole
        scale = min(1.0, (step + 1) / (0.05 * whole)) * (0.1 + 0.45 * (1 + np.cos(np.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        starts = torch.randint(0, ids.numel() - settings.context, (settings.batch,), generator=generator)
        batch = torch.stack([ids[s : s + settings.context] for s in starts.tolist()])
        found_here = model(input_ids=batch, labels=batch)
        loss = found_here.loss
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(input_ids=batch).logits
            loss = distilled(loss, kl_divergence(wanted, found_here.logits, 1.0), TEACHER_WEIGHT, 1.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.process_time() - begin
    return {"losses": found, "cpu_s": spent, "optimizer": optimizer}


@torch.no_grad()
def held_out_loss(model: Any, ids: torch.Tensor, settings: Settings, windows: int) -> float:
    """Return the loss in nats/token over so many windows spread over a held-out split."""
    count = min(windows, ids.numel() // settings.context)
    starts = torch.linspace(0, ids.numel() - settings.context, count).long().tolist()
    rows = torch.stack([ids[s : s + settings.context] for s in starts])
    losses = [float(model(input_ids=r, labels=r).loss) * len(r) for r in rows.split(64)]
    return sum(losses) / count


def source(settings: Settings) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the pretrained source, the state of its optimizer with it, and what its making cost.

    Made once and cached.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = CACHE / f"source-{settings.key}"
    if not (home / "made.json").is_file():
        ids = tokens(settings)
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config(settings).items() if k != "architectures"}))
        half = ids["train"][: ids["train"].numel() // 2]
        at_end = {settings.steps: partial(held_out_loss, ids=ids["validation"], settings=settings, windows=512)}
        run = train(model, half, settings, steps=settings.steps, rate=settings.rate,
                    weight_decay=settings.weight_decay, seed=settings.seed, evaluate=at_end)  # fmt: skip
        model.save_pretrained(home)
        save_state(model, run["optimizer"], home)
        place = CACHE / f"novels-{settings.vocab_size}-{settings.train_characters}" / "tokenizer.json"
        PreTrainedTokenizerFast(tokenizer_file=str(place), bos_token="<s>", eos_token="<s>").save_pretrained(home)
        made = {"validation_loss": run["losses"][settings.steps], "cpu_s": run["cpu_s"], "settings": asdict(settings)}
        (home / "made.json").write_text(json.dumps(made))
    return home, json.loads((home / "made.json").read_text())
