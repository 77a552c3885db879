"""Tiny checkpoints from a config and a seed, and the command line in this process or in one of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

# A slow machine is no failure: nothing here asserts a time.
hypothesis.settings.register_profile("anysize", deadline=None)
hypothesis.settings.load_profile("anysize")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Two workers share two cores: threads inside torch, here or in a command, only make them wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.02,
    "transformers_version": "5.17.0",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, ffn, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (queries, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, queries),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
                "input_layernorm": (hidden,),
                "post_attention_layernorm": (hidden,),
            }.items()
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _tokenizer_files(folder: Path, vocab_size: int) -> None:
    words = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(3, vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))


def make_llama(folder: Path, *, dtype: str = "float32", seed: int = 0, shards: int = 1, **changes: Any) -> Path:
    """Write a llama with every weight random, so that every mistake shows, and return its folder."""
    config = {**CONFIG, "dtype": dtype, **changes}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in _shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        values = 1 + 0.2 * noise if len(shape) == 1 else noise * (0.5 if "embed" in name else 1.2 / shape[-1] ** 0.5)
        tensors[name] = values.to(DTYPES[dtype])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _tokenizer_files(folder, config["vocab_size"])
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({n: tensors[n] for n, f in weight_map.items() if f == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tokenized data away from the cache of whoever runs the tests."""
    os.environ["ANYSIZE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def new_llama() -> Callable[..., Path]:
    """The function that writes a llama; see `make_llama`."""
    return make_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with tokenizer and generation config; shared, so never written to."""
    return make_llama(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the head tied to the embedding."""
    return make_llama(tmp_path_factory.mktemp("source") / "tied-llama", tie_word_embeddings=True)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons start no processes."""
    from anysize.comparison import workers
    from tests.comparison.runs import InThisProcess

    monkeypatch.setattr(workers, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(workers, "as_completed", list)


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in which the next word can mostly be told from the last, so that a loss can fall."""
    generator = torch.Generator().manual_seed(5)
    word, words = 3, []
    for _ in range(12_000):
        word = 3 + (7 * (word - 3) + int(torch.randint(0, 3, (), generator=generator))) % 58
        words.append(f"w{word}")
    path = tmp_path_factory.mktemp("data") / "story.txt"
    path.write_text(" ".join(words))
    return path


@pytest.fixture(scope="session")
def weights_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """The function that reads every tensor of a checkpoint folder with the safetensors library."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}

    return read


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """The command line, run in this process: everything but the start of an interpreter."""
    from anysize.cli.main import main

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["anysize", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Ran(exit_.value.code or 0, out, err)

    return run


@pytest.fixture(scope="session")
def process() -> Callable[..., Ran]:
    """The command line in a process of its own, output piped."""

    def run(*arguments: object, **environment: str) -> Ran:
        command = [str(Path(sys.executable).with_name("anysize")), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=120, check=False
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of words that the tiny llamas' tokenizer knows, seeded."""
    draws = torch.randint(3, 61, (6000,), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text(" ".join(f"w{i}" for i in draws))
    return path


@pytest.fixture(scope="session")
def scores(llama: Path, text: Path) -> Any:
    """What calibration finds of `llama` on `text`."""
    import anysize

    return anysize.calibrate(llama, text, sequence_length=64)


@pytest.fixture(scope="session")
def tied_scores(tied_llama: Path, text: Path) -> Any:
    """The same of `tied_llama`."""
    import anysize

    return anysize.calibrate(tied_llama, text, sequence_length=64)


@pytest.fixture(scope="session")
def speaking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a byte-level tokenizer whose special tokens come last; shared, so never written to."""
    from tests.speaking import make_speaking

    return make_speaking(tmp_path_factory.mktemp("source") / "speaking", make_llama)


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that its tokenizer was not made for, in part."""
    path = tmp_path_factory.mktemp("data") / "page.txt"
    path.write_text("The cat looked at the hat. " * 9 + "At the mat then.")
    return path
