"""The demo: pretrain a small model on the standard library's sources, grow it, and show that nothing was lost.

Needs no network and no data beside Python itself. The text is what `sysconfig` calls the standard library; every
tenth file is held out.
"""

from __future__ import annotations

import shutil
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from anysize import api
from anysize.cli.progress import progress_bars
from anysize.cli.show import console, show_plan, show_proof
from anysize.errors import OutputError
from anysize.io.models import config_of, quiet_transformers

_VOCAB_SIZE = 1024
_CONTEXT = 128
_BATCH = 8
_RATE = 2e-3
_WARMUP = 0.05
_TRAIN_BYTES = 6_000_000
_HELD_OUT_BYTES = 400_000
_MARKER = ".anysize-demo"
_PROMPT = "def __init__(self"
_GROWN = {"hidden_size": 192, "intermediate_size": 448, "num_attention_heads": 6, "num_key_value_heads": 3}


def _sources() -> tuple[str, str]:
    """Return (training text, held-out text) from the standard library, in a fixed order."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    train = "\n\n".join(text for i, text in enumerate(texts) if i % 10)
    held_out = "\n\n".join(text for i, text in enumerate(texts) if not i % 10)
    return train[:_TRAIN_BYTES], held_out[:_HELD_OUT_BYTES]


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
        "head_dim": 32, "max_position_embeddings": _CONTEXT * 2, "tie_word_embeddings": True, "bos_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip


def _model() -> Any:
    from transformers import LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    return LlamaForCausalLM(config_of(source_config()))


def _batches(ids: torch.Tensor) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(0, ids.numel() - _CONTEXT - 1, (_BATCH,), generator=generator)
        yield torch.stack([ids[s : s + _CONTEXT] for s in starts.tolist()])


def _pretrain(model: Any, ids: torch.Tensor, seconds: float) -> int:
    """Train for a time, not for a number of steps, so that every machine waits about as long; return the steps."""
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=(0.9, 0.95))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    step, start = 0, time.perf_counter()
    with Progress(*columns, transient=True, disable=not console().is_terminal) as bar:
        task = bar.add_task("pretrain", total=seconds, loss="")
        for batch in _batches(ids):
            done = (time.perf_counter() - start) / seconds
            if done >= 1:
                return step
            rate = _RATE * min(1.0, done / _WARMUP) * (1 - 0.9 * done)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0:
                bar.update(task, completed=done * seconds, loss=f"loss {loss.item():.3f}")
    raise AssertionError("batches never end")


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    """Return the loss on consecutive windows of held-out text, in nats/token."""
    windows = ids[: ids.numel() // _CONTEXT * _CONTEXT].reshape(-1, _CONTEXT)
    losses = [float(model(input_ids=w, labels=w).loss) * len(w) for w in windows.split(64)]
    return sum(losses) / len(windows)


@torch.no_grad()
def _text(model: Any, tokenizer: Any) -> str:
    prompt = tokenizer(_PROMPT, return_tensors="pt").input_ids
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(out[0])


def _load(folder: Path) -> tuple[Any, Any]:
    """Load a folder as any user would."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def _make_source(folder: Path, train: str, held_out: str, seconds: float) -> torch.Tensor:
    """Pretrain and save the source with its tokenizer; return the held-out token ids."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    out = console()
    tokenizer = _tokenizer(train)
    ids = torch.tensor(tokenizer.encode(train).ids)
    model = _model()
    count = sum(p.numel() for p in model.parameters())
    out.print(f"2. pretrain {count:,} parameters on {ids.numel():,} tokens for {seconds:g} s", highlight=False)
    steps = _pretrain(model, ids, seconds)
    out.print(f"   {steps} steps, {steps * _BATCH * _CONTEXT:,} tokens", highlight=False)
    with quiet_transformers():
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>").save_pretrained(folder)
    return torch.tensor(tokenizer.encode(held_out).ids)


def _make_room(output: Path, folders: tuple[Path, ...]) -> None:
    """Remove what an earlier demo left; refuse a folder that holds anything else."""
    marker = output / _MARKER
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not marker.is_file())):
        raise OutputError(f"'{output}' holds something that no demo has made: choose another folder with --output")
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    try:
        output.mkdir(parents=True, exist_ok=True)
        marker.write_text("Made by `anysize demo`, which replaces what lies here.\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the output '{output}' cannot be made: {error.strerror}") from error


def run_demo(output: Path, seconds: float) -> dict[str, Any]:
    """Pretrain, grow, prove and compare; both models stay in `output`.

    Returns each model's folder, parameters, held-out loss in nats/token and text, and whether every proof passed.
    """
    out = console()
    source, grown = output / "source", output / "grown"
    _make_room(output, (source, grown))
    train, held_out = _sources()
    out.print(f"1. read {len(train) + len(held_out):,} characters of the standard library's sources", highlight=False)
    ids = _make_source(source, train, held_out, seconds)
    out.print(f"3. plan: {', '.join(f'{name} {size}' for name, size in _GROWN.items())}", highlight=False)
    plan = api.plan(source, **_GROWN)  # pyright: ignore[reportArgumentType]
    show_plan(plan, as_json=False)
    out.print("4. grow and prove", highlight=False)
    with progress_bars(enabled=True) as progress:
        _, proof = api.apply_with_proof(plan, grown, command="anysize demo", progress=progress)
    show_proof(proof)
    out.print("5. both models, loaded with plain transformers", highlight=False)
    found: dict[str, Any] = {"exact": plan.exact, "proof_passed": proof.passed}
    for name, folder in (("source", source), ("grown", grown)):
        model, tokenizer = _load(folder)
        loss, text = _loss(model, ids), _text(model, tokenizer)
        count = model.num_parameters()
        out.print(f"   {name}: {count:,} parameters, held-out loss {loss:.6f} nats/token", highlight=False)
        for line in text.splitlines():
            out.print(f"   | {line}", highlight=False, markup=False)
        found[name] = {"folder": str(folder), "num_parameters": count, "loss_nats_per_token": loss, "text": text}
    out.print(f"made {source} and {grown}", highlight=False)
    return found
