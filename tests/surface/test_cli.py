"""What the commands do: exit codes, what they print and where, and what they leave on the disk."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.cli.main import app

Run = Callable[..., Any]
Weights = Callable[[Path], dict[str, torch.Tensor]]

WIDER = ("--hidden-size", 48, "--num-attention-heads", 8, "--num-key-value-heads", 4)
ANSI = "\x1b"
BOX = "─│┃━┏"

SIZES = {
    "--hidden-size", "--intermediate-size", "--num-hidden-layers", "--num-attention-heads", "--num-key-value-heads",
    "--head-dim", "--vocab-size", "--keep-tokens", "--pad-vocab-to-multiple-of", "--num-experts", "--scale",
    "--num-params", "--like",
}  # fmt: skip
HOW = {
    "--preset",
    "--calibration",
    "--column",
    "--select",
    "--readers",
    "--layers",
    "--search-tokens",
    "--noise-db",
    "--seed",
    "--dtype",
    "--untie",
    "--stream-scale",
    "--low-memory",
    "--json",
}
APPLYING = {"--verify", "--max-shard-size", "--overwrite", "--allow-nonfinite", "--json"}
OPTIONS = {
    "resize": SIZES | HOW | APPLYING | {"--plan-only"},
    "plan": SIZES | HOW | {"-o", "--output"},
    "apply": APPLYING | {"--source"},
    "calibrate": {
        "-o", "--output", "--tokens", "--sequence-length", "--batch-size", "--column", "--label-column",
        "--second-moments", "--leave-one-out", "--low-memory", "--device", "--tokenizer", "--json",
    },
    "eval": {
        "--data", "--source", "--tokens", "--sequence-length", "--batch-size", "--column", "--label-column", "--split",
        "--device", "--dtype", "--tokenizer", "--tasks", "--task-data", "--limit", "-o", "--output", "--json",
    },
    "verify": {"--json"},
    "inspect": {"--json"},
    "draft": {
        "--data", "--held-out", "--column", "--hidden-size", "--intermediate-size", "--num-hidden-layers",
        "--num-attention-heads", "--num-key-value-heads", "--scale", "--num-params", "--steps", "--batch-size",
        "--sequence-length", "--learning-rate", "--drafted", "--prompts", "--new-tokens", "--json",
    },
    "report": {"-o", "--output", "--card", "--json"},
    "train": {"--set", "--plan-only", "--json"},
    "compare": {"--set", "--json"},
    "demo": {"-o", "--output", "--seconds", "--json"},
}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def model_files(folder: Path) -> dict[str, bytes]:
    """The bytes that two runs share; card and record also hold the command."""
    return {name: data for name, data in files(folder).items() if name not in ("README.md", "anysize.json")}


@pytest.fixture(scope="session")
def grown(llama: Path, tmp_path_factory: pytest.TempPathFactory, process: Run) -> tuple[Path, Any]:
    """A real `anysize resize`, and what it printed."""
    output = tmp_path_factory.mktemp("grown") / "grown"
    return output, process("resize", llama, output, *WIDER)


def test_public_names_are_frozen() -> None:
    assert anysize.__all__ == ["Plan", "__version__", "apply", "calibrate", "evaluate", "plan", "resize", "verify"]
    assert all(getattr(anysize, name) is not None for name in anysize.__all__)


def test_commands_and_their_options_are_frozen() -> None:
    import typer

    commands: dict[str, Any] = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    found = {
        name: {option for p in command.params if p.param_type_name == "option" for option in p.opts}
        for name, command in commands.items()
    }
    assert found == OPTIONS


def test_resize_exits_0_and_prints_plain_lines_where_piped(grown: tuple[Path, Any]) -> None:
    output, ran = grown
    assert ran.code == 0, ran.err
    assert ANSI not in ran.out + ran.err
    assert not set(BOX) & set(ran.out)
    assert "exact: the target computes the same function as the source" in ran.out
    assert "all proofs passed" in ran.out
    assert f"made {output}" in ran.out
    assert ran.err.splitlines() == ["miniature proof ...", "write ...", "compare whole models ..."]


def test_the_output_folder_is_a_complete_checkpoint(grown: tuple[Path, Any], llama: Path) -> None:
    output, _ = grown
    made, source = files(output), files(llama)
    assert sorted(made) == sorted([*source, "README.md", "anysize.json"])
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert made[name] == source[name]
    config, before = json.loads(made["config.json"]), json.loads(source["config.json"])
    changed = {key for key in config if config[key] != before.get(key)}
    assert changed == {"hidden_size", "num_attention_heads", "num_key_value_heads"}
    card = made["README.md"].decode()
    assert card.startswith("---\nbase_model: tiny-llama\nlibrary_name: transformers\ntags:\n- anysize\n- fresh\n---\n")
    assert f"anysize resize {llama} {output} --hidden-size 48" in card


def test_the_record_holds_plan_proof_and_versions(grown: tuple[Path, Any]) -> None:
    output, _ = grown
    record = json.loads((output / "anysize.json").read_text())
    assert record["exact"] is True
    assert record["plan"]["target_config"]["hidden_size"] == 48
    assert {c["name"] for c in record["proof"]["checks"]} >= {"miniature", "coverage", "algebra", "logits", "greedy"}
    assert record["versions"].keys() == {"torch", "transformers", "safetensors", "numpy", "python"}
    assert record["command"].startswith("anysize resize ")


def test_the_output_loads_with_auto_classes_and_generates_the_same_ids(grown: tuple[Path, Any], llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = []
    for folder in (llama, grown[0]):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("w5 w9 w31 w7", return_tensors="pt")
        assert prompt.input_ids.tolist() == [[5, 9, 31, 7]]
        ids = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, max_new_tokens=20, do_sample=False,
                             eos_token_id=None, pad_token_id=0)  # fmt: skip
        texts.append(ids.tolist())
    assert len(texts[0][0]) == 24
    assert texts[0] == texts[1]


def test_plan_saved_then_applied_gives_the_bytes_of_resize(
    grown: tuple[Path, Any], llama: Path, tmp_path: Path, process: Run
) -> None:
    planned = process("plan", llama, *WIDER, "-o", tmp_path / "plan.json", "--json")
    assert planned.code == 0
    assert json.loads(planned.out) == json.loads((tmp_path / "plan.json").read_text())
    applied = process("apply", tmp_path / "plan.json", tmp_path / "out", "--json")
    assert applied.code == 0, applied.err
    told = json.loads(applied.out)
    assert (told["passed"], told["exact"], told["output"]) == (True, True, str(tmp_path / "out"))
    assert applied.err == ""
    assert model_files(tmp_path / "out") == model_files(grown[0])


def test_verify_passes_on_the_real_target(grown: tuple[Path, Any], llama: Path, process: Run) -> None:
    ran = process("verify", llama, grown[0])
    assert ran.code == 0, ran.err
    assert "all proofs passed" in ran.out
    assert ANSI not in ran.out


@pytest.mark.parametrize(
    ("tensor", "failing"),
    [
        ("model.embed_tokens.weight", {"algebra", "logits", "logits KL", "cache", "greedy"}),
        ("model.layers.1.mlp.down_proj.weight", {"algebra", "logits", "cache"}),
        ("model.norm.weight", {"algebra", "logits"}),
    ],
)
def test_verify_exits_1_and_names_the_checks_that_a_flipped_tensor_fails(
    grown: tuple[Path, Any], llama: Path, tmp_path: Path, cli: Run, tensor: str, failing: set[str]
) -> None:
    tampered = tmp_path / "tampered"
    shutil.copytree(grown[0], tampered)
    tensors = load_file(tampered / "model.safetensors")
    tensors[tensor] = -tensors[tensor]
    save_file(tensors, tampered / "model.safetensors", metadata={"format": "pt"})
    ran = cli("verify", llama, tampered, "--json")
    assert ran.code == 1
    told = json.loads(ran.out)
    assert not told["passed"]
    assert {failure.partition(":")[0] for failure in told["failures"]} >= failing
    shown = cli("verify", llama, tampered)
    assert shown.code == 1
    assert "NOT the same: algebra: measured" in shown.out


def test_verify_catches_a_tampered_target_that_was_never_exact(llama: Path, tmp_path: Path, cli: Run) -> None:
    made = cli("resize", llama, tmp_path / "out", "--num-hidden-layers", 4, "--layers", "interpose")
    assert made.code == 0, made.err
    assert cli("verify", llama, tmp_path / "out").code == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].roll(1, dims=0)
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    ran = cli("verify", llama, tmp_path / "out")
    assert ran.code == 1
    assert "NOT the same: algebra" in ran.out


def test_verify_refuses_two_families_and_a_damaged_record(
    grown: tuple[Path, Any], llama: Path, tmp_path: Path, cli: Run
) -> None:
    shutil.copytree(grown[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "anysize.json").write_text("{}")
    for command in (("verify", llama, tmp_path / "damaged"), ("inspect", tmp_path / "damaged")):
        ran = cli(*command)
        assert ran.code == 2
        assert "anysize.json' is not a record of anysize (KeyError('command')): mend or remove it" in ran.err


def test_inspect_says_what_a_checkpoint_is(grown: tuple[Path, Any], llama: Path, process: Run, cli: Run) -> None:
    ran = process("inspect", grown[0], "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["sizes"] == {
        "hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 61, "head_dim": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    assert found["exact"] is True
    assert found["made_by"].startswith("anysize resize")
    shown = cli("inspect", llama)
    assert shown.code == 0
    assert re.search(r"hidden_size +32\n", shown.out)
    assert "made by" not in shown.out


def test_an_accelerator_without_memory_is_told_in_one_sentence(
    llama: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("anysize.api.make_plan", full)
    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has 1 GiB.")
    ran = cli("plan", llama, "--scale", "2")
    assert ran.code == 2
    assert "the accelerator has no memory left (CUDA out of memory)" in ran.err
    # What is wrong with us stays to be seen.
    error = RuntimeError("our mistake")
    with pytest.raises(RuntimeError, match="our mistake"):
        cli("plan", llama, "--scale", "2")


def test_json_is_one_object_on_errors_of_every_kind(llama: Path, tmp_path: Path, cli: Run) -> None:
    wrong = [
        (("resize", llama, tmp_path / "out", "--hidden-size", 47, "--json"), "SizeError"),
        (("plan", tmp_path, "--hidden-size", 48, "--json"), "CheckpointError"),
        (("plan", llama, "--hidden-siz", 48, "--json"), "InputError"),
        (("plan", llama, "--hidden-size", "many", "--json"), "InputError"),
        (("resize", llama, "--json"), "InputError"),
    ]
    for command, kind in wrong:
        ran = cli(*command)
        told = json.loads(ran.out)
        assert (ran.code, told["exit_code"], told["kind"]) == (2, 2, kind)
        assert ran.err == f"anysize: {told['error']}\n"


@pytest.mark.parametrize("asked", [("--json",), ()])
def test_plan_only_writes_nothing(llama: Path, tmp_path: Path, cli: Run, asked: tuple[str, ...]) -> None:
    ran = cli("resize", llama, tmp_path / "out", *WIDER, "--plan-only", *asked)
    assert ran.code == 0
    assert (json.loads(ran.out)["format"] == 1) if asked else ("exact:" in ran.out)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_never_takes_the_place_of_other_tensors(llama: Path, text: Path, tmp_path: Path, cli: Run) -> None:
    scores = tmp_path / "llama.safetensors"
    assert cli("calibrate", llama, text, "-o", scores, "--tokens", 2048, "--sequence-length", 64).code == 0
    before, half = scores.read_bytes(), ("--hidden-size", 16, "--readers", "least-squares", "--calibration", scores)
    for name, why in (
        ("llama.json", "llama.safetensors', which is no plan's"), ("plan.safetensors", "name a .json file"),
        ("absent/plan.json", "its folder does not exist"), (".", "it is a folder"),
    ):  # fmt: skip
        ran = cli("plan", llama, *half, "-o", tmp_path / name)
        assert (ran.code, why in ran.err) == (2, True), ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["llama.safetensors"]
    assert scores.read_bytes() == before
    # Its own matrices it may replace.
    for _ in range(2):
        assert cli("plan", llama, *half, "-o", tmp_path / "plan.json").code == 0
    assert cli("apply", tmp_path / "plan.json", tmp_path / "out").code == 0


def test_apply_refuses_a_source_that_changed(new_llama: Run, tmp_path: Path, cli: Run) -> None:
    source = new_llama(tmp_path / "source")
    assert cli("plan", source, *WIDER, "-o", tmp_path / "plan.json").code == 0
    new_llama(source, dtype="bfloat16")
    ran = cli("apply", tmp_path / "plan.json", tmp_path / "out")
    assert ran.code == 2
    assert ran.err == (
        f"anysize: '{source}' is not the source this plan was made for: its config; tensor headers changed; "
        "plan again\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "source"]


HALF = ("--hidden-size", 16)


@pytest.mark.parametrize(
    "asked",
    [
        HALF,
        (*HALF, "--preset", "subcloning"),
        (*HALF, "--select", "stride", "--readers", "measured"),
        ("--num-hidden-layers", 1, "--layers", "block-influence"),
        ("--intermediate-size", 24, "--select", "weight"),
    ],
    ids=["fitted", "chosen by scores", "scaled by scores", "layers", "chosen by weight"],
)
def test_a_plan_that_read_weights_is_for_these_weights_alone(
    new_llama: Run, text: Path, tmp_path: Path, cli: Run, asked: tuple[Any, ...]
) -> None:
    source, plan, out = new_llama(tmp_path / "source"), tmp_path / "plan.json", tmp_path / "out"
    scored = () if "weight" in asked else ("--calibration", text)
    assert cli("plan", source, *asked, *scored, "-o", plan).code == 0
    assert cli("apply", plan, out).code == 0
    assert cli("verify", source, out).code == 0
    new_llama(source, seed=1)
    stale = cli("apply", plan, tmp_path / "stale")
    told = f"anysize: '{source}' is not the source this plan was made for: its weights changed; plan again\n"
    assert (stale.code, stale.err) == (2, told)
    assert not (tmp_path / "stale").exists()
    ran = cli("verify", source, out)
    assert ran.code == 2
    assert f"'{source}' is not the source that the plan of the target was made for: its weights changed" in ran.err


@pytest.mark.parametrize(
    "asked", [WIDER, HALF, (*HALF, "--select", "random"), ("--num-hidden-layers", 1), (*WIDER, "--preset", "fresh")]
)
def test_a_plan_that_read_no_weights_goes_for_any_of_its_shapes(
    new_llama: Run, tmp_path: Path, cli: Run, asked: tuple[Any, ...]
) -> None:
    source, plan, out = new_llama(tmp_path / "source"), tmp_path / "plan.json", tmp_path / "out"
    assert cli("plan", source, *asked, "-o", plan).code == 0
    new_llama(source, seed=1)
    assert cli("apply", plan, out).code == 0
    assert cli("verify", source, out).code == 0


def test_a_plan_of_before_that_knows_no_weights_is_taken_at_its_word(new_llama: Run, tmp_path: Path, cli: Run) -> None:
    source, plan = new_llama(tmp_path / "source"), tmp_path / "plan.json"
    assert cli("plan", source, *HALF, "--select", "weight", "-o", plan).code == 0
    older = json.loads(plan.read_text())
    assert older["source"].pop("weights_sha256")
    plan.write_text(json.dumps(older))
    assert cli("apply", plan, tmp_path / "out").code == 0


def test_apply_finds_a_source_that_moved(new_llama: Run, tmp_path: Path, cli: Run) -> None:
    source = new_llama(tmp_path / "source")
    assert cli("plan", source, *WIDER, "-o", tmp_path / "plan.json").code == 0
    source.rename(tmp_path / "moved")
    lost = cli("apply", tmp_path / "plan.json", tmp_path / "out")
    assert lost.code == 2
    assert f"'{source}' is not a folder" in lost.err
    assert cli("apply", tmp_path / "plan.json", tmp_path / "out", "--source", tmp_path / "moved").code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_overwrite_replaces_the_folder_whole(llama: Path, tmp_path: Path, cli: Run) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "model-00001-of-00002.safetensors").write_text("of another model")
    (output / "config.json").write_text("{}")
    refused = cli("resize", llama, output, *WIDER, "--verify", "off")
    assert refused.code == 2
    assert "is not empty: choose another one or pass --overwrite" in refused.err
    assert cli("resize", llama, output, *WIDER, "--verify", "off", "--overwrite").code == 0
    assert [p.name for p in output.glob("*.safetensors")] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_max_shard_size_gives_files_that_load_and_hold_the_same_tensors(
    grown: tuple[Path, Any], llama: Path, tmp_path: Path, cli: Run, weights_of: Weights
) -> None:
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    assert cli("resize", llama, output, *WIDER, "--verify", "full", "--max-shard-size", "40KB").code == 0
    shards = sorted(output.glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [p.name for p in shards]
    one, many = weights_of(grown[0]), weights_of(output)
    assert one.keys() == many.keys() == index["weight_map"].keys()
    assert all(one[name].equal(many[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(loaded[name].equal(one[name]) for name in one)


def test_a_terminal_gets_a_table_in_boxes(llama: Path) -> None:
    reader, writer = pty.openpty()
    command = [str(Path(sys.executable).with_name("anysize")), "plan", str(llama), *map(str, WIDER)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160", "LINES": "50", "PYTHONIOENCODING": "utf-8"}
    with subprocess.Popen(command, stdout=writer, stderr=writer, stdin=writer, env=environment) as running:
        os.close(writer)
        shown = b""
        while True:
            try:
                piece = os.read(reader, 65536)
            except OSError:  # the last writer has closed the terminal
                break
            if not piece:
                break
            shown += piece
    os.close(reader)
    text = shown.decode()
    assert running.returncode == 0
    assert all(mark in text for mark in BOX)
    assert ANSI in text
    assert "norm(hidden) -> ffn" in re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_paths_are_printed_as_they_are(new_llama: Run, tmp_path: Path, cli: Run) -> None:
    """Square brackets are markup to rich; in a path they are a path."""
    source = new_llama(tmp_path / "a[bold]b[/x]")
    ran = cli("resize", source, tmp_path / "out[/red]", *WIDER, "--verify", "off")
    assert ran.code == 0
    assert f"made {tmp_path}/out[/red]: " in ran.out
    assert f"{source} (llama)" in ran.out


def test_no_arguments_show_the_help_and_version_the_version(cli: Run) -> None:
    shown = cli()
    assert shown.code == 0
    assert all(f"  {name} " in shown.out for name in OPTIONS)
    assert cli("--version").out == f"{anysize.__version__}\n"
