"""Calibration: what is summed, resumed, shared between processes, kept in a file, and refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import anysize
from anysize.calibration.calibrate import moment_stride, scores_bytes
from anysize.calibration.data import DataOptions, token_batches, tokenizer_of
from anysize.calibration.scores import Scores
from anysize.calibration.sites import sites
from anysize.config import understand
from anysize.errors import CheckpointError, InputError, SizeError
from anysize.io.models import new_model
from anysize.io.reader import Checkpoint
from anysize.proof.parity import load
from tests import tiny

Run = Callable[..., Any]


def same(one: Scores, other: Scores, tolerance: float = 0.0) -> bool:
    assert one.sites.keys() == other.sites.keys()
    pairs = [(one.of(site, kind), other.of(site, kind)) for site in one.sites for kind in one.sites[site]]
    pairs += [(one.block(kind), other.block(kind)) for kind in one.blocks]
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in pairs)


@pytest.mark.parametrize("variant", [v for v in tiny.VARIANTS if v.name != "350m"], ids=str)
def test_every_site_of_every_family_is_seen_and_every_reader_has_its_norm(variant: tiny.Variant) -> None:
    from anysize.proof.cuts import miniature_scores

    source = tiny.source(variant)
    config = understand(source.config)
    found = miniature_scores(source, config)
    for name, site in sites(config).items():
        assert found.of(name, "abs").shape == (len(found.of(name, "rms")),)
        if site.side == "in" and str(site.dim) == "norm(hidden)":
            canonical = found.record.aliases.get(name, name)
            assert found.record.feeds[canonical] in {s.module for s in sites(config).values() if s.is_norm}


def test_scores_are_those_of_the_model(llama: Path, text: Path, scores: Scores) -> None:
    model = load(llama, "LlamaForCausalLM")
    options = DataOptions(sequence_length=64)
    config = understand(Checkpoint(llama).config)
    seen: list[torch.Tensor] = []
    hook = model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].detach().reshape(-1, 48))
    )
    stream: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in token_batches(str(text), tokenizer_of(str(llama)), config.sizes["vocab"], options):
            stream.append(torch.stack(model(**batch, output_hidden_states=True).hidden_states))
    hook.remove()
    x = torch.cat(seen).double()
    assert len(x) == scores.record.tokens
    assert scores.of("model.layers.1.mlp.down_proj:in", "abs").allclose(x.abs().mean(0), rtol=1e-5)
    before, after = (torch.cat([s[i].reshape(-1, 32) for s in stream]) for i in (0, 1))
    cosine = torch.nn.functional.cosine_similarity(before, after, dim=-1)
    assert float(scores.block("influence")[0]) == pytest.approx(float(1 - cosine.mean()), rel=1e-4)


def test_a_scores_file_gives_the_scores_back(llama: Path, scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors")
    assert again.record == scores.record
    assert again.sha256 == scores.sha256
    assert same(again, scores, 1e-6)
    plans = [anysize.plan(llama, calibration=c, hidden_size=16) for c in (scores, tmp_path / "scores.safetensors")]
    assert plans[0].recipes == plans[1].recipes


def test_the_size_that_is_told_is_about_the_size_of_the_file(llama: Path, scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.safetensors")
    told = scores_bytes(understand(Checkpoint(llama).config), second_moments=True)
    assert 0.5 < told / (tmp_path / "scores.safetensors").stat().st_size < 2


@pytest.mark.parametrize("options", [{"hidden_size": 16}, {"num_hidden_layers": 1, "layers": "evolutionary"}])
def test_data_that_are_read_again_have_to_be_those_of_the_scores(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path / "cache"))
    data = written(tmp_path / "data.txt", text.read_bytes())
    monkeypatch.chdir(tmp_path)
    scores = anysize.calibrate(llama, "data.txt", sequence_length=64, tokens=2048)
    monkeypatch.chdir("/")
    assert scores.record.data == str(data)
    assert anysize.plan(llama, calibration=scores, **options).recipes
    written(data, "w5 " + text.read_text())
    with pytest.raises(InputError, match=r"the data '/.*data\.txt', as .* are not those that the scores were made of"):
        anysize.plan(llama, calibration=scores, **options)


@pytest.mark.parametrize("options", [{"hidden_size": 16}, {"num_hidden_layers": 1, "layers": "evolutionary"}])
def test_data_are_read_again_with_the_tokenizer_that_was_named(
    new_llama: Callable[..., Path], llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:  # fmt: skip
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path / "cache"))
    mute = new_llama(tmp_path / "mute")
    for path in mute.glob("tokenizer*"):
        path.unlink()
    monkeypatch.chdir(llama.parent)
    scores = anysize.calibrate(mute, text, sequence_length=64, tokens=2048, tokenizer=llama.name)
    monkeypatch.chdir(tmp_path)
    scores.save(tmp_path / "scores.safetensors")
    assert anysize.plan(mute, calibration=tmp_path / "scores.safetensors", **options).recipes


@pytest.mark.parametrize("more", [[], ["--low-memory"]], ids=["whole", "layer by layer"])
def test_two_processes_find_the_same(llama: Path, text: Path, tmp_path: Path, more: list[str]) -> None:
    anysize.calibrate(llama, text, output=tmp_path / "one.safetensors", sequence_length=64, batch_size=4)
    script = tmp_path / "run.py"
    # Whoever has nothing to save waits for the one that has.
    script.write_text(
        "import time\n"
        "from anysize.calibration.scores import Scores\n"
        "from anysize.cli.main import main\n"
        "save = Scores.save\n"
        "Scores.save = lambda scores, path: (time.sleep(4), save(scores, path))[1]\n"
        "main()\n"
    )
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = ["-o", str(tmp_path / "two.safetensors"), "--sequence-length", "64", "--batch-size", "4", "--json", *more]
    done = subprocess.run(
        [*shared, "calibrate", str(llama), str(text), *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # One of them speaks, once the file is whole.
    assert json.loads(done.stdout)["num_bytes"] == (tmp_path / "two.safetensors").stat().st_size
    assert not list(tmp_path.glob(".*"))
    one, two = (Scores.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.record.tokens == two.record.tokens
    assert same(one, two, 1e-6)


@pytest.mark.parametrize("more", [[], ["--low-memory"]], ids=["whole", "layer by layer"])
def test_two_processes_with_data_for_one_refuse_together_and_leave_nothing(
    llama: Path, tmp_path: Path, more: list[str]
) -> None:
    data = written(tmp_path / "data.txt", " ".join(["w5"] * 300))
    script = tmp_path / "run.py"
    # One of them takes its time to clean up.
    script.write_text(
        "import os, time\n"
        "from anysize.cli.main import main\n"
        "from anysize.io.lock import FolderLock\n"
        "release = FolderLock.release\n"
        "FolderLock.release = lambda lock: (time.sleep(0 if int(os.environ['RANK']) else 2), release(lock))[1]\n"
        "main()\n"
    )
    shared = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    options = ["-o", str(tmp_path / "scores.safetensors"), "--sequence-length", "64", "--batch-size", "4", *more]
    done = subprocess.run(
        [*shared, "calibrate", str(llama), str(data), *options],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode != 0
    told = f"anysize: the data '{data}' give 1 of 2 processes no batch: give more data, smaller batches or fewer"
    assert done.stderr.count(told) == 2, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.txt", "run.py"]


def test_leave_one_out_is_the_loss_without_the_layer(llama: Path, text: Path) -> None:
    # Of 9 sequences, so that the second batch has one.
    found = anysize.calibrate(llama, text, sequence_length=64, leave_one_out=True, tokens=576)
    model = load(llama, "LlamaForCausalLM")
    options = DataOptions(sequence_length=64, tokens=576, batch_size=9)
    (batch,) = token_batches(str(text), tokenizer_of(str(llama)), 61, options)

    def loss() -> float:
        with torch.no_grad():
            return float(model(**batch, labels=batch["input_ids"]).loss)

    whole = loss()
    model.model.layers = model.model.layers[1:]
    model.config.num_hidden_layers = 1
    for layer in model.model.layers:
        layer.self_attn.layer_idx = 0
    assert float(found.block("leave-one-out")[0]) == pytest.approx(loss() - whole, abs=1e-5)
    assert anysize.plan(llama, calibration=found, num_hidden_layers=1, layers="leave-one-out").layers


def test_leave_one_out_is_measured_where_layers_are_dropped_by_it(llama: Path, text: Path, scores: Scores) -> None:
    kept = [
        [step.source for step in anysize.plan(llama, calibration=c, num_hidden_layers=1, layers="leave-one-out").layers]
        for c in (text, anysize.calibrate(llama, text, sequence_length=128, leave_one_out=True))
    ]
    assert kept[0] == kept[1]
    with pytest.raises(SizeError, match="needs the layers' scores: calibrate with --leave-one-out, or choose middle"):
        anysize.plan(llama, calibration=scores, num_hidden_layers=1, layers="leave-one-out")


def test_what_has_no_loss_is_not_scored_by_it(llama: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.calibration.calibrate.loaded_source", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="sequences of 1 have none: give a --sequence-length of at least 2"):
        anysize.calibrate(llama, text, sequence_length=1, tokens=64, leave_one_out=True)


def test_a_loss_that_is_no_number_is_no_score(llama: Path, text: Path) -> None:
    model = load(llama, "LlamaForCausalLM")
    with torch.no_grad():
        # After all that is scored by itself.
        model.get_submodule("lm_head").weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="the loss of the source is nan on these data"):
        anysize.calibrate(model, text, sequence_length=64, tokens=64, leave_one_out=True, tokenizer=str(llama))


@pytest.mark.parametrize("low_memory", [False, True])
def test_activations_that_are_no_numbers_score_nothing(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path, low_memory: bool
) -> None:
    weights = new_llama(tmp_path / "source") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, weights, {"format": "pt"})
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"computes at 'model.layers.1.mlp.down_proj:in' holds NaN or infinity"):
        anysize.calibrate(
            tmp_path / "source", text, sequence_length=64, tokens=512, low_memory=low_memory,
            output=tmp_path / "out" / "scores.safetensors",
        )  # fmt: skip
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("batch_size", [3, 8, 100])
def test_leave_one_out_sees_as_many_sequences_in_batches_of_any_size(
    llama: Path, text: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.calibration import leave_one_out

    seen: list[int] = []
    run = leave_one_out._loss

    def loss(model: Any, batch: dict[str, torch.Tensor]) -> float:
        seen.append(len(batch["input_ids"]))
        return run(model, batch)

    monkeypatch.setattr(leave_one_out, "_loss", loss)
    options = {"sequence_length": 32, "tokens": 100 * 32, "second_moments": False, "leave_one_out": True}
    found = anysize.calibrate(llama, text, batch_size=batch_size, **options)
    assert sum(seen) == 3 * 64, "with both layers, and without each"
    expected = anysize.calibrate(llama, text, **options)
    assert found.block("leave-one-out").allclose(expected.block("leave-one-out"), atol=1e-5)


def test_a_model_in_memory_stays_in_its_mode(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path))
    model = load(llama, "LlamaForCausalLM").train()
    model.get_submodule("model.layers.0").eval()
    before = {name: module.training for name, module in model.named_modules()}
    scores = anysize.calibrate(model, text, sequence_length=64, tokens=64, tokenizer=str(llama))
    assert {name: module.training for name, module in model.named_modules()} == before
    anysize.plan(model, num_hidden_layers=1, layers="evolutionary", calibration=scores)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_images_are_read_by_an_image_model(tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == "vit")
    model = tiny.model(variant, dtype=torch.float32)
    model.save_pretrained(tmp_path / "vit")
    rows = []
    for shade in range(0, 250, 50):
        path = tmp_path / f"{shade}.png"
        Image.new("RGB", (8, 8), (shade, 0, 255 - shade)).save(path)
        other = tmp_path / f"mask-{shade}.png"
        Image.new("RGB", (8, 8), (0, shade // 2, 0)).save(other)
        shown, mask = ({"bytes": p.read_bytes(), "path": p.name} for p in (path, other))
        rows.append({"mask": mask, "image": shown, "label": shade})
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "images.parquet")
    pictures = tmp_path / "images.parquet"
    found = anysize.calibrate(tmp_path / "vit", pictures, tokens=5, batch_size=2, column="image")
    assert found.record.tokens == 5
    masks = [anysize.calibrate(tmp_path / "vit", pictures, tokens=5, batch_size=2, column=c) for c in ("mask", "")]
    assert same(*masks)
    assert not same(found, masks[0], 1e-6)
    with pytest.raises(InputError, match="have no column 'imgae'"):
        anysize.calibrate(tmp_path / "vit", pictures, tokens=5, column="imgae")
    with pytest.raises(InputError, match=r"would do nothing: '.*vit' reads images"):
        anysize.calibrate(tmp_path / "vit", pictures, tokens=5, tokenizer=str(tmp_path))
    with pytest.raises(InputError, match=r"a sequence length of 1024 would do nothing: '.*vit' reads images"):
        anysize.calibrate(tmp_path / "vit", pictures, tokens=5, sequence_length=1024)
    assert found.of("vit.embeddings.patch_embeddings.projection:out", "abs").shape == (24,)
    half = {"hidden_size": 16, "intermediate_size": 10, "num_attention_heads": 2}
    assert anysize.plan(tmp_path / "vit", calibration=found, preset="subcloning", **half).recipes
    made = anysize.resize(tmp_path / "vit", tmp_path / "half", calibration=found, **half)
    from transformers import ViTForImageClassification

    small = ViTForImageClassification.from_pretrained(made)
    assert small(torch.zeros(1, 3, 12, 12)).logits.shape == (1, 7)


def test_pictures_of_channels_that_none_has_are_refused(tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == "vit")
    raw = {**tiny.config(variant), "num_channels": 4}
    new_model("ViTForImageClassification", raw, torch.float32).save_pretrained(tmp_path / "vit")
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    import datasets

    shown = {"bytes": (tmp_path / "0.png").read_bytes(), "path": "0.png"}
    datasets.Dataset.from_list([{"image": shown}]).to_parquet(tmp_path / "images.parquet")
    with pytest.raises(InputError, match=r"num_channels=4: images are read as grey \(1\) or as red, green and blue"):
        anysize.calibrate(tmp_path / "vit", tmp_path / "images.parquet", tokens=1)


def test_the_stride_keeps_second_moments_cheaper_than_the_model() -> None:
    wide = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 8192,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
    }  # fmt: skip
    assert moment_stride(understand(wide)) > 10
    assert moment_stride(understand({**wide, "intermediate_size": 128})) == 1


BAD_DATA: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda f: f / "absent.txt", "do not exist"),
    "an empty folder": (lambda f: f, "holds no .txt"),
    "another kind": (lambda f: written(f / "x.bin", "w3"), "is none of .txt"),
    "too little": (lambda f: written(f / "x.txt", "w3 w4"), "too few for one sequence of 64"),
    "damaged parquet": (lambda f: written(f / "x.parquet", "PAR1"), "cannot read the data file"),
    "no text column": (lambda f: written(f / "x.jsonl", '{"a": 1}\n'), "have no text column"),
    "not utf-8": (lambda f: written(f / "x.txt", b"\xff\xfe"), "as text"),
}


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_used_are_refused_in_one_sentence(llama: Path, tmp_path: Path, cli: Run, name: str) -> None:
    make, why = BAD_DATA[name]
    data = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    ran = cli("calibrate", llama, data, "-o", tmp_path / "scores.safetensors", "--sequence-length", 64)
    assert ran.code == 2
    assert why in ran.err
    assert ran.err.splitlines()[-1].startswith("anysize: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_column_is_chosen_or_named(llama: Path, tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(3, 60))
    data = written(tmp_path / "x.jsonl", json.dumps({"title": "w3 " * 500, "story": words * 20}) + "\n")
    with pytest.raises(InputError, match="name one with --column"):
        anysize.calibrate(llama, data, sequence_length=64)
    with pytest.raises(InputError, match="no column 'stroy'; of text they have title, story"):
        anysize.calibrate(llama, data, sequence_length=64, column="stroy")
    one, two = (anysize.calibrate(llama, data, sequence_length=64, column=c) for c in ("title", "story"))
    assert not same(one, two, 1e-6)


def test_the_tokenizer_of_another_model_is_refused(
    llama: Path, new_llama: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    small = new_llama(tmp_path / "small", vocab_size=40)
    with pytest.raises(InputError, match="this tokenizer is not the model's"):
        anysize.calibrate(small, text, sequence_length=64, tokenizer=str(llama))
    other = shutil.copytree(llama, tmp_path / "other")
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"w3": words["model"]["vocab"]["w4"], "w4": words["model"]["vocab"]["w3"]}
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(InputError, match=r"is not that of '.*': 2 tokens have other ids there \('w3' is"):
        anysize.calibrate(llama, text, sequence_length=64, tokenizer=str(other))
    (small / "tokenizer.json").unlink()
    (small / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="has no tokenizer that transformers can read"):
        anysize.calibrate(small, text, sequence_length=64)


def test_the_scores_of_another_model_are_refused(
    new_llama: Callable[..., Path], scores: Scores, tmp_path: Path
) -> None:
    other = new_llama(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="the scores were made for another model"):
        anysize.plan(other, calibration=scores, hidden_size=16)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("lm_head.weight", slice(1, None)),
        ("lm_head.weight", slice(-1, None)),
        ("model.layers.1.mlp.down_proj.weight", slice(10, 12)),
        ("model.norm.weight", slice(5, 6)),
    ],
    ids=["all but the first row", "the last row", "a row of a small matrix", "a gain"],
)
def test_a_model_that_was_trained_on_is_another_one(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path, name: str, rows: slice
) -> None:
    source = new_llama(tmp_path / "tuned", vocab_size=600)
    scores = anysize.calibrate(source, text, sequence_length=64, tokens=256)
    scores.require_model(Checkpoint(source))
    weights = load_file(source / "model.safetensors")
    weights[name][rows] += 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the scores were made for another model"):
        scores.require_model(Checkpoint(source))


def test_a_model_whose_neurons_were_pruned_is_another_one(
    new_llama: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    source = new_llama(tmp_path / "pruned", intermediate_size=600)
    scores = anysize.calibrate(source, text, sequence_length=64, tokens=256)
    weights = load_file(source / "model.safetensors")
    gate = weights["model.layers.1.mlp.gate_proj.weight"]
    # More than is hashed as a whole, and every tenth neuron.
    assert gate.numel() > 16_384
    gate[8::10] = 0
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="the scores were made for another model"):
        scores.require_model(Checkpoint(source))


@pytest.mark.parametrize("written_as", [1, 4])
def test_scores_of_another_format_are_named(scores: Scores, tmp_path: Path, written_as: int) -> None:
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    record = json.dumps(scores.record.model_dump() | {"format": written_as})
    save_file(load_file(path), path, {"anysize": record})
    with pytest.raises(CheckpointError, match=f"are of format {written_as}, this version reads 5: calibrate again"):
        Scores.load(path)


def test_what_is_no_scores_file_is_refused(llama: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "scores.safetensors", b"nothing")
    with pytest.raises(CheckpointError, match="is not a scores file that anysize calibrate wrote"):
        anysize.plan(llama, calibration=path, hidden_size=16)
    with pytest.raises(CheckpointError, match="is not a scores file"):
        anysize.plan(llama, calibration=llama / "model.safetensors", hidden_size=16)


def test_scores_that_do_not_exist_are_told_how_to_make(llama: Path, tmp_path: Path, cli: Run) -> None:
    missing = tmp_path / "scores.safetensors"
    refused = cli("plan", llama, "--hidden-size", 16, "--calibration", missing)
    assert refused.code == 2
    told = (
        f"the scores file '{missing}' does not exist: make it with anysize calibrate SOURCE DATA --output '{missing}'"
    )
    assert told in refused.err


def test_scores_without_second_moments_select_but_do_not_fit(llama: Path, text: Path) -> None:
    plain = anysize.calibrate(llama, text, sequence_length=64, second_moments=False)
    assert anysize.plan(llama, calibration=plain, preset="subcloning", hidden_size=16).recipes
    with pytest.raises(CheckpointError, match="calibrate again with second moments"):
        anysize.plan(llama, calibration=plain, hidden_size=16)


def test_an_illegal_size_is_refused_before_any_calibration(llama: Path) -> None:
    with pytest.raises(InputError, match="nearest legal hidden_size"):
        anysize.plan(llama, calibration="/no/such/data.txt", hidden_size=17)


def test_the_command_writes_scores_and_resize_uses_them(llama: Path, text: Path, tmp_path: Path, cli: Run) -> None:
    scores = tmp_path / "scores.safetensors"
    ran = cli("calibrate", llama, text, "-o", scores, "--sequence-length", 64, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["output"] == str(scores)
    assert len(told["layers"]["influence"]) == 2
    ran = cli("resize", llama, tmp_path / "half", "--hidden-size", 16, "--calibration", scores)
    assert ran.code == 0, ran.err
    assert "with preset subspace" in ran.out
    assert "turned to the kept directions" in ran.out
    assert "not exact: hidden 32 -> 16: kept by principal, readers sequential" in ran.out
    record = json.loads((tmp_path / "half" / "anysize.json").read_text())
    assert record["plan"]["scores_sha256"] == told["scores_sha256"]
