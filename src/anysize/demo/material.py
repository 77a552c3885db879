"""What the demo is made of: the standard library's sources as text, a tokenizer trained on them, and a blank model.

Needs no network and no data beside Python itself. The text is what `sysconfig` calls the standard library; of every ten
files one is held out to choose by, and one to measure on.
"""

from __future__ import annotations

import shutil
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anysize.errors import OutputError
from anysize.io.models import config_of, quiet_transformers
from anysize.io.whole import told_of_disk

CONTEXT = 128
BATCH = 8
_VOCAB_SIZE = 1024
_TRAIN_BYTES = 6_000_000
_HELD_OUT_BYTES = 400_000
_MARKER = ".anysize-demo"
_PROMPT = "def __init__(self"


def write_texts(folder: Path) -> dict[str, int]:
    """Write train.txt, validation.txt and test.txt, the same for the same Python; return their characters."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    parts = {
        "train": "\n\n".join(text for i, text in enumerate(texts) if i % 10 > 1)[:_TRAIN_BYTES],
        "validation": "\n\n".join(texts[0::10])[:_HELD_OUT_BYTES],
        "test": "\n\n".join(texts[1::10])[:_HELD_OUT_BYTES],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in parts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return {name: len(text) for name, text in parts.items()}


def _tokenizer(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text[:1_000_000]], trainer)
    return tokenizer


def source_config() -> dict[str, Any]:
    """Return the config of the model that the demo pretrains."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": _VOCAB_SIZE, "hidden_size": 128,
        "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "max_position_embeddings": CONTEXT * 2, "tie_word_embeddings": True, "bos_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip


def make_blank(folder: Path, train: Path) -> int:
    """Write a model of random weights with a tokenizer trained on the text; return its parameters."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: PLC0415

    tokenizer = _tokenizer(train.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    with quiet_transformers():
        model = LlamaForCausalLM(config_of(source_config()))
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return model.num_parameters()


def steps_in(seconds: float, folder: Path, *, threads: int | None = None) -> int:
    """Return how many training steps a model takes in a time, from a few that are timed here."""
    model, _ = load_plainly(folder)
    model.train()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = torch.randint(0, _VOCAB_SIZE, (BATCH, CONTEXT), device=device)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    taken: list[float] = []
    for _ in range(8):
        begin = time.perf_counter()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        taken.append(time.perf_counter() - begin)
    torch.set_num_threads(before)
    return max(8, int(seconds / min(taken)))


@torch.no_grad()
def text_of(model: Any, tokenizer: Any) -> str:
    """Return what a model writes, greedily, after the beginning of a method."""
    prompt = tokenizer(_PROMPT, return_tensors="pt").input_ids
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0])


def load_plainly(folder: Path) -> tuple[Any, Any]:
    """Load a folder as any user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def make_room(output: Path, folders: tuple[Path, ...]) -> None:
    """Remove what an earlier demo left; refuse a folder that holds anything else."""
    marker = output / _MARKER
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not marker.is_file())):
        raise OutputError(f"'{output}' holds something that no demo has made: choose another folder with --output")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    with told_of_disk(f"the output '{output}' cannot be made"):
        output.mkdir(parents=True, exist_ok=True)
        marker.write_text("Made by `anysize demo`, which replaces what lies here.\n", encoding="utf-8")
