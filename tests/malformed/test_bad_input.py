"""Bad input: one clear sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.api import apply_with_proof
from anysize.errors import AnysizeError, CheckpointError, InputError, OutputError
from anysize.io.reader import Checkpoint

WEIGHTS = "model.safetensors"
Edit = Callable[[Path], None]


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(edit: Callable[[dict[str, Any]], object], tail: Callable[[bytes], bytes] = bytes) -> Edit:
    """Return an edit of the header of the weights file, and of its data."""

    def apply(folder: Path) -> None:
        entries, data = header(folder / WEIGHTS)
        edit(entries)
        text = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + tail(data))

    return apply


def put(name: str, text: str | bytes) -> Edit:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text) and None


def config(**changes: Any) -> Edit:
    def apply(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, **changes}))

    return apply


def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Edit:
    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        edit(state)
        save_file(state, folder / WEIGHTS)

    return apply


def index(weight_map: dict[str, Any]) -> Edit:
    def apply(folder: Path) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return apply


def shard_lost(folder: Path) -> None:
    index({NORM: "model-1.safetensors"})(folder)
    (folder / WEIGHTS).unlink()


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


def linked_away(folder: Path) -> None:
    outside = folder.parent / "elsewhere.safetensors"
    shutil.move(folder / WEIGHTS, outside)
    (folder / WEIGHTS).symlink_to(outside)


def entry(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries[name].update(changes)


NORM = "model.norm.weight"
BAD: dict[str, tuple[Edit, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config not JSON": (put("config.json", "{"), "is not valid JSON"),
    "config not an object": (put("config.json", "[1]"), "holds a list, wanted a JSON object"),
    "config not text": (put("config.json", b"\xff\xfe\x00"), "is not valid JSON"),
    "no model_type": (config(model_type=None), "no 'model_type'"),
    "unknown family": (config(model_type="lama"), "model_type 'lama' has no table (did you mean 'llama'?)"),
    "unknown setting": (config(residual_multiplier=0.3), "residual_multiplier=0.3"),
    "misspelt setting": (config(mlp_bia=True), "mlp_bia=True (did you mean 'mlp_bias'?)"),
    "quantized": (config(quantization_config={"bits": 4}), "resize the unquantized original"),
    "another class": (config(architectures=["LlamaForSequenceClassification"]), "knows LlamaForCausalLM"),
    "size of zero": (config(num_hidden_layers=0), "sizes make no sense"),
    "size of text": (config(hidden_size="wide"), "sizes make no sense"),
    "size of half": (config(hidden_size=32.5), "the hidden axis has no whole size of at least 1 (hidden_size=32.5)"),
    "size of truth": (config(vocab_size=True), "the vocab axis has no whole size of at least 1 (vocab_size=True)"),
    "flag of text": (config(tie_word_embeddings="no"), "tie_word_embeddings='no' is neither true nor false"),
    "negative spread": (config(initializer_range=-0.1), "initializer_range=-0.1 is not a standard deviation"),
    "unknown activation": (config(hidden_act="sillu"), "transformers cannot build a LlamaForCausalLM of this config"),
    "unknown positions": (config(rope_parameters={"rope_type": "odd", "rope_theta": 1e4}), "KeyError: 'odd'"),
    "labels of numbers": (config(id2label=5), "id2label is 5, wanted an object"),
    "digits beyond reading": (put("config.json", '{"a": ' + "9" * 5000 + "}"), "is not valid JSON"),
    "config of other weights": (config(hidden_size=40), "wrong shapes"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no model.safetensors"),
    "pickled weights": (pickled, "pickled weights only (pytorch_model.bin)"),
    "empty file": (put(WEIGHTS, b""), "is not a safetensors file or is cut short"),
    "short header": (put(WEIGHTS, struct.pack("<Q", 500) + b"{}"), "is not a safetensors file or is cut short"),
    "huge header": (put(WEIGHTS, struct.pack("<Q", 2**62) + b"{}"), "is not a safetensors file or is cut short"),
    "zero header": (put(WEIGHTS, struct.pack("<Q", 0) + b"{}"), "is not a safetensors file or is cut short"),
    "header not JSON": (put(WEIGHTS, struct.pack("<Q", 4) + b"abcd"), "a header that is not valid JSON"),
    "header not an object": (put(WEIGHTS, struct.pack("<Q", 2) + b"[]"), "a header that is not a JSON object"),
    "nested header": (put(WEIGHTS, struct.pack("<Q", 60_000) + b"[" * 60_000), "a header that is not valid JSON"),
    "name twice": (put(WEIGHTS, struct.pack("<Q", 18) + b'{"a": {}, "a": {}}'), "'a' stands twice"),
    "65 dims": (rewrite(entry(NORM, shape=[1] * 65)), "describes tensor 'model.norm.weight'"),
    "offset beyond counting": (rewrite(entry(NORM, shape=[2**70])), "describes tensor 'model.norm.weight'"),
    "unknown type": (rewrite(entry(NORM, dtype="F7")), "describes tensor 'model.norm.weight'"),
    "negative shape": (rewrite(entry(NORM, shape=[-32])), "describes tensor 'model.norm.weight'"),
    "boolean shape": (rewrite(entry(NORM, shape=[True])), "describes tensor 'model.norm.weight'"),
    "boolean offset": (rewrite(entry(NORM, data_offsets=[False, True])), "describes tensor 'model.norm.weight'"),
    "other shape": (rewrite(entry(NORM, shape=[31])), "needs 124 bytes"),
    "beyond the file": (rewrite(entry(NORM, data_offsets=[10**9, 10**9 + 128])), "cut short"),
    "overlap": (rewrite(entry(NORM, data_offsets=[0, 128])), "but the one before ends at"),
    "cut short": (rewrite(lambda _: None, lambda data: data[:-4]), "is cut short"),
    "bytes after the end": (rewrite(lambda _: None, lambda data: data + b"xx"), "2 bytes after its last tensor"),
    "index not JSON": (put("model.safetensors.index.json", "{"), "is not a safetensors index"),
    "index of a list": (put("model.safetensors.index.json", "[]"), "it has no object 'weight_map'"),
    "index names one twice": (put("model.safetensors.index.json", '{"a": 1, "a": 2}'), "'a' stands twice"),
    "index leaves": (index({NORM: "../x.safetensors"}), "is not a safetensors file in this folder"),
    "index absolute": (index({NORM: "/tmp/x.safetensors"}), "is not a safetensors file in this folder"),
    "index of numbers": (index({NORM: 3}), "is not a safetensors file in this folder"),
    "missing shard": (shard_lost, "'model-1.safetensors', which is missing"),
    "two layouts": (index({NORM: "model-1.safetensors"}), "holds both model.safetensors and"),
    "tensor not indexed": (index({NORM: WEIGHTS}), "which the index does not name"),
    "indexed twice": (index({NORM: WEIGHTS, "odd": WEIGHTS}), "lacks tensor 'odd'"),
    "link out of the folder": (linked_away, "is a link that leaves the checkpoint folder"),
    "missing tensor": (tensors(lambda s: s.pop(NORM)), "missing tensors: model.norm.weight"),
    "extra tensor": (tensors(lambda s: s.update(odd=torch.ones(3))), "does not have: odd"),
    "wrong shape": (tensors(lambda s: s.update({NORM: torch.ones(31)})), "got [31], wanted [32]"),
    "integer weights": (tensors(lambda s: s.update({NORM: torch.ones(32, dtype=torch.int32)})), "I32"),
    "NaN": (tensors(lambda s: s[NORM].fill_(float("nan"))), "holds NaN or Inf"),
    "Inf": (tensors(lambda s: s[NORM].fill_(float("inf"))), "holds NaN or Inf"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_source_is_refused_and_leaves_nothing(new_llama: Callable[..., Path], tmp_path: Path, name: str) -> None:
    source = new_llama(tmp_path / "source")
    edit, why = BAD[name]
    edit(source)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as refusal:
        anysize.resize(source, tmp_path / "out" / "deep", intermediate_size=61)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2
    assert sorted(tmp_path.iterdir()) == before


def test_the_generator_of_bad_sources_starts_from_a_good_one(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    anysize.plan(new_llama(tmp_path / "source"), intermediate_size=61)


def test_nan_is_let_through_where_allowed(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source")
    tensors(lambda s: s[NORM][:1].fill_(float("inf")))(source)
    plan = anysize.plan(source, intermediate_size=61)
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        apply_with_proof(plan, tmp_path / "out", verify="off")
    from anysize.executor import target_tensors

    made = target_tensors(plan, Checkpoint(source), allow_nonfinite=True)
    assert torch.isinf(made[NORM]).sum() == 1


def test_a_hub_snapshot_with_links_into_its_blobs_is_read(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    repo = tmp_path / "models--org--tiny"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "abc"
    new_llama(blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert len(Checkpoint(snapshot).tensors) == 21


def test_a_weight_that_the_asked_type_cannot_hold_is_refused(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source")
    tensors(lambda s: s[NORM][:1].fill_(70_000.0))(source)
    with pytest.raises(CheckpointError, match="holds values up to 7e\\+04, which float16 cannot store"):
        anysize.resize(source, tmp_path / "out", intermediate_size=61, dtype="float16")
    assert list(tmp_path.iterdir()) == [source]
    made = anysize.resize(source, tmp_path / "out", intermediate_size=61, dtype="bfloat16", verify="off")
    assert Checkpoint(made).tensors[NORM].dtype == "BF16"


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, "no size was asked for"),
        ({"hidden_size": 33}, "nearest legal hidden_size: 32 or 36"),
        ({"hidden_size": 0}, "hidden_size=0 is not a size"),
        ({"head_dim": 16}, "rotary positions turn pairs of channels"),
        ({"num_experts": 4}, "a llama has no expert axis"),
        ({"num_attention_heads": 7}, "nearest legal num_attention_heads: 4 or 8"),
        ({"scale": -0.5}, "scale -0.5: wanted a number above 0"),
        ({"scale": 2, "num_params": 10**6}, "scale and num_params both choose the sizes"),
        ({"num_params": 10}, "num_params 10: the nearest legal config has"),
        ({"hidden_size": 64, "preset": "hypercloned"}, "unknown preset 'hypercloned' (did you mean 'hypercloning'?)"),
        ({"num_hidden_layers": 3, "layers": "idenity"}, "is neither identity"),
        ({"num_hidden_layers": 3, "layers": "0,1"}, "lists 2 layers, but num_hidden_layers is 3"),
        ({"num_hidden_layers": 3, "layers": "0,1,2"}, "does not lie in 0-1"),
        ({"num_hidden_layers": 1, "layers": "identity"}, "'identity' adds layers; to drop some: middle"),
        ({"hidden_size": 64, "dtype": "int8"}, "dtype='int8'"),
        ({"pad_vocab_to_multiple_of": 0}, "wanted at least 1"),
        ({"untie": True}, "not tied to its embedding"),
        ({"like": "no/such folder"}, "is not a folder"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_illegal_request_is_refused_before_any_work(llama: Path, given: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError) as refusal:
        anysize.plan(llama, **given)
    assert why in str(refusal.value)


def test_an_output_that_is_not_empty_is_left_alone(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty: choose another one or pass --overwrite"):
        anysize.resize(llama, tmp_path / "out", intermediate_size=61)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_an_output_that_is_a_file_or_lies_in_the_source_is_refused(
    new_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = new_llama(tmp_path / "source")
    (tmp_path / "file").write_text("mine")
    for output, why in (
        (tmp_path / "file", "exists and is not a folder"),
        (tmp_path / "file" / "below", "is not a folder that we may write to"),
        (source, "lie in one another"),
        (source / "out", "lie in one another"),
        (tmp_path, "lie in one another"),
    ):
        with pytest.raises(OutputError, match=why):
            anysize.resize(source, output, intermediate_size=61, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_disk_that_is_too_full_is_refused_before_writing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=100))
    with pytest.raises(OutputError, match="bytes are needed, 100 are free"):
        anysize.resize(llama, tmp_path / "out", intermediate_size=61)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, pwrite = 0, os.pwrite

    def full(file: int, data: Any, position: int) -> int:
        nonlocal written
        written += len(data)
        if written > 20_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, position)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match="No space left on device"):
        anysize.resize(llama, tmp_path / "a" / "out", intermediate_size=61)
    assert list(tmp_path.iterdir()) == []


def test_a_second_copy_that_differs_from_what_it_is_tied_to_is_refused(
    new_llama: Callable[..., Path], tmp_path: Path
) -> None:
    source = new_llama(tmp_path / "source", tie_word_embeddings=True)
    state = load_file(source / WEIGHTS)
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, source / WEIGHTS)
    plan = anysize.plan(source, intermediate_size=61)
    assert "second copy" in plan.dropped["lm_head.weight"]
    apply_with_proof(plan, tmp_path / "same", verify="off")
    save_file({**state, "lm_head.weight": state["model.embed_tokens.weight"] + 1}, source / WEIGHTS)
    with pytest.raises(CheckpointError, match="with other values than"):
        anysize.resize(source, tmp_path / "other", intermediate_size=61)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["unknown family", "cut short", "NaN"])
def test_the_command_says_one_sentence_and_exits_2(
    new_llama: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any], name: str
) -> None:
    source = new_llama(tmp_path / "source")
    BAD[name][0](source)
    ran = cli("resize", source, tmp_path / "out", "--intermediate-size", 61, "--json")
    assert ran.code == 2
    told = [line for line in ran.err.splitlines() if line.startswith("anysize: ")]
    assert len(told) == 1
    assert BAD[name][1] in told[0]
    assert json.loads(ran.out)["exit_code"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_every_refusal_is_an_input_error() -> None:
    assert issubclass(InputError, AnysizeError)
    assert InputError.exit_code == 2


def test_switches_that_are_off_and_unknown_ask_for_nothing(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source", rope_interleaved=False, is_llama_config=True)
    assert anysize.plan(source, intermediate_size=61).exact
    with pytest.raises(InputError, match="rope_interleaved=True"):
        anysize.plan(new_llama(tmp_path / "other", rope_interleaved=True), intermediate_size=61)


def test_remote_code_is_not_asked_for_by_the_target(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source", auto_map={"AutoConfig": "configuration_x.XConfig"})
    made = anysize.resize(source, tmp_path / "out", intermediate_size=61, verify="off")
    assert "auto_map" not in json.loads((Path(str(made)) / "config.json").read_text())


def with_code(source: Path) -> Path:
    """Give a source a tokenizer with code of its own, which leaves a file behind where it runs."""
    place = source / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    place.write_text(json.dumps({**json.loads(place.read_text()), **own}))
    (source / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        "Path(__file__).with_name('ran').touch()\nclass Own(PreTrainedTokenizerFast): pass\n"
    )
    return source


def test_code_of_a_tokenizer_is_not_run_whatever_is_typed(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = with_code(new_llama(tmp_path / "source"))
    command = [sys.executable, "-m", "anysize", "calibrate", str(source), str(text), "-o", "s.safetensors"]
    done = subprocess.run(command, cwd=tmp_path, input="y\n" * 9, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is a class of its own, whose code is never run" in done.stderr
    assert not list(tmp_path.rglob("ran"))
    assert not (tmp_path / "s.safetensors").exists()


def test_a_target_asks_for_no_code_and_its_tokenizer_loads(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = with_code(new_llama(tmp_path / "source"))
    made = Path(str(anysize.resize(source, tmp_path / "out", intermediate_size=61, verify="off")))
    assert "auto_map" not in json.loads((made / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(made, trust_remote_code=False)("w3 w4").input_ids == [3, 4]
    # To cut its tokens both tokenizers are run, to see that they agree.
    with pytest.raises(InputError, match="whose code is never run"):
        anysize.resize(source, tmp_path / "cut", keep_tokens=list(range(40)))
    assert not (tmp_path / "cut").exists()
    assert not list(tmp_path.rglob("ran"))


def test_a_context_of_few_positions_has_a_miniature(new_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source", max_position_embeddings=8)
    assert anysize.resize(source, tmp_path / "out", intermediate_size=61, verify="off")


@pytest.mark.parametrize("source", [None, 5, torch.nn.Linear(2, 2)], ids=["none", "number", "module"])
def test_what_is_no_source_is_refused(source: Any) -> None:
    with pytest.raises(InputError, match="wanted a folder, a Hub id or a transformers model"):
        anysize.plan(source, hidden_size=16)


def test_a_seed_beyond_what_generators_take_is_refused(llama: Path) -> None:
    with pytest.raises(InputError, match="seed=18446744073709551616"):
        anysize.plan(llama, hidden_size=64, seed=2**64)


def test_a_projection_that_would_vanish_is_refused() -> None:
    from anysize.config import understand
    from anysize.errors import SizeError
    from anysize.target import resolve

    raw = {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 24, "ffn_dim": 48,
        "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 50, "word_embed_proj_dim": 48,
    }  # fmt: skip
    with pytest.raises(SizeError, match=r"at these sizes a opt has other parts: .*embed_tokens"):
        resolve(understand(raw), {"hidden_size": 48})


@pytest.mark.parametrize("cut", [{}, {"keep_tokens": list(range(0, 61, 2))}], ids=["all tokens", "half of them"])
def test_a_folder_resized_in_memory_keeps_how_it_generates(
    new_llama: Callable[..., Path], tmp_path: Path, cut: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM

    source = new_llama(tmp_path / "source")
    told = {"max_new_tokens": 7, "do_sample": True, "temperature": 0.5, "eos_token_id": [1, 8], "suppress_tokens": [4]}
    (source / "generation_config.json").write_text(json.dumps(told))
    made: Any = anysize.resize(source, intermediate_size=61, verify="off", **cut)
    loaded = AutoModelForCausalLM.from_pretrained(
        anysize.resize(source, tmp_path / "out", intermediate_size=61, verify="off", **cut)
    )
    assert (made.generation_config.max_new_tokens, made.generation_config.temperature) == (7, 0.5)
    assert (made.generation_config.eos_token_id == [1, 8]) == (not cut)
    assert made.generation_config.to_dict() == loaded.generation_config.to_dict()


@pytest.mark.parametrize(
    ("text", "why"), [("[]", "holds a list, wanted a JSON object"), ('{"max_new_tokens": -1}', "greater than 0")]
)
def test_a_damaged_generation_config_is_one_sentence(
    new_llama: Callable[..., Path], tmp_path: Path, text: str, why: str
) -> None:
    source = new_llama(tmp_path / "source")
    (source / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"generation_config.json.*{why}"):
        anysize.resize(source, intermediate_size=61, verify="off")


def test_a_loaded_model_keeps_how_it_generates(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    model.generation_config.max_new_tokens = 7
    made = anysize.resize(model, intermediate_size=61, verify="off")
    assert made.generation_config.max_new_tokens == 7  # pyright: ignore[reportAttributeAccessIssue]
    anysize.resize(model, tmp_path / "out", intermediate_size=61, verify="off")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7
