"""Streamed output equals the executor's in memory, bit by bit, whatever the files, the threads or the history."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import anysize
from anysize.errors import OutputError
from anysize.executor import target_tensors
from anysize.io import writer
from anysize.io.reader import Checkpoint
from anysize.io.writer import JOURNAL, CheckpointWriter, check_output, parse_bytes, shards_of, staging_folder
from anysize.recipe import Plan

Run = Callable[..., Any]
Weights = Callable[[Path], dict[str, torch.Tensor]]

PRESETS = (
    "hypercloning", "hypercloning-noisy", "hypercloning-diagonal", "hypercloning-noisy-diagonal", "split", "fresh",
)  # fmt: skip
# Prime and fractional where the family allows it, and one added layer.
SIZES = {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 101,
         "num_hidden_layers": 3, "vocab_size": 67}  # fmt: skip
ONE_FILE = 10**12


def write(plan: Plan, source: Checkpoint, output: Path, *, shard: int = ONE_FILE, key: str = "plan") -> list[str]:
    """Stream a plan to a folder; return the tensors that were written rather than found there."""
    with CheckpointWriter(output, plan.recipes, key, shard) as made:
        before = set(made.done)
        made.write(plan, source, allow_nonfinite=False, progress=lambda _: None)
        made.finish()
    return [recipe.name for recipe in plan.recipes if recipe.name not in before]


def assert_same(made: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert made.keys() == wanted.keys()
    different = [
        name
        for name, tensor in wanted.items()
        if made[name].dtype != tensor.dtype
        or not made[name].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8))
    ]
    assert different == []


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_streamed_equals_in_memory(
    new_llama: Run, tmp_path: Path, weights_of: Weights, preset: str, dtype: str
) -> None:
    folder = new_llama(tmp_path / "source", dtype=dtype)
    plan, source = anysize.plan(folder, preset=preset, **SIZES), Checkpoint(folder)
    wanted = target_tensors(plan, source)
    write(plan, source, tmp_path / "one")
    assert_same(weights_of(tmp_path / "one"), wanted)
    write(plan, source, tmp_path / "many", shard=20_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 10
    assert_same(weights_of(tmp_path / "many"), wanted)


def test_a_sharded_source_gives_the_bytes_of_a_single_file(new_llama: Run, tmp_path: Path) -> None:
    for shards in (1, 4):
        folder = new_llama(tmp_path / f"source{shards}", shards=shards)
        write(anysize.plan(folder, **SIZES), Checkpoint(folder), tmp_path / f"out{shards}")
    one, many = ((tmp_path / f"out{shards}" / "model.safetensors").read_bytes() for shards in (1, 4))
    assert one == many


def test_a_loaded_model_gives_the_bytes_of_its_folder(llama: Path, tmp_path: Path, weights_of: Weights) -> None:
    from transformers import AutoModelForCausalLM

    anysize.resize(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "model", verify="off", **SIZES)
    anysize.resize(llama, tmp_path / "folder", verify="off", **SIZES)
    assert_same(weights_of(tmp_path / "model"), weights_of(tmp_path / "folder"))


@pytest.mark.parametrize("preset", ["hypercloning-noisy", "split", "fresh"])
def test_the_number_of_workers_and_small_blocks_change_nothing(
    new_llama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """The embedding is wider than a block, so that several workers share a tensor."""
    folder = new_llama(tmp_path / "source", vocab_size=40_000, hidden_size=16, num_attention_heads=2)
    plan, source = anysize.plan(folder, preset=preset, hidden_size=40), Checkpoint(folder)
    made = []
    for workers in (1, 2, 5):
        monkeypatch.setattr(writer, "_WORKERS", workers)
        write(plan, source, tmp_path / str(workers))
        made.append((tmp_path / str(workers) / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


def interrupted(plan: Plan, source: Checkpoint, output: Path, after: int, *, key: str = "plan") -> None:
    """Write `after` tensors and stop as Ctrl-C does."""
    written = 0

    class Stopping(Checkpoint):
        def read(self, name: str) -> torch.Tensor:
            nonlocal written
            if written == after:
                raise KeyboardInterrupt
            written += 1
            return super().read(name)

    with pytest.raises(KeyboardInterrupt):
        write(plan, Stopping(source.folder), output, key=key)


def test_a_resumed_run_writes_what_is_missing_and_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    plan, source = anysize.plan(llama, preset="split", **SIZES), Checkpoint(llama)
    write(plan, source, tmp_path / "undisturbed")
    for after in (0, 1, 7, len(plan.recipes) - 1):
        output = tmp_path / f"after{after}"
        interrupted(plan, source, output, after)
        assert not output.exists()
        assert len(write(plan, source, output)) == len(plan.recipes) - after
        assert (output / "model.safetensors").read_bytes() == (
            tmp_path / "undisturbed" / "model.safetensors"
        ).read_bytes()
        assert [p.name for p in output.iterdir()] == ["model.safetensors"]


def test_an_output_that_a_kill_left_aside_comes_back(llama: Path, tmp_path: Path) -> None:
    plan, source, output = anysize.plan(llama, preset="split", **SIZES), Checkpoint(llama), tmp_path / "out"
    write(plan, source, output)
    before = (output / "model.safetensors").read_bytes()
    # Between the two renames of a run with --overwrite.
    output.rename(tmp_path / ".out.anysize-old")
    staging_folder(output).mkdir()
    with pytest.raises(OutputError, match="is not empty: choose another one or pass --overwrite"):
        check_output(output, 0, overwrite=False)
    assert (output / "model.safetensors").read_bytes() == before
    # After both of them it is of no use any more.
    output.rename(tmp_path / ".out.anysize-old")
    staging_folder(output).rmdir()
    check_output(output, 0, overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_the_lock_is_held_until_the_output_has_its_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, source = anysize.plan(llama, preset="split", **SIZES), Checkpoint(llama)
    rename = Path.rename

    def second_run(path: Path, target: Path) -> Path:
        with pytest.raises(OutputError, match="another run is writing"):
            write(plan, source, tmp_path / "out")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", second_run)
    write(plan, source, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_work_of_another_plan_is_thrown_away(llama: Path, tmp_path: Path, weights_of: Weights) -> None:
    source = Checkpoint(llama)
    first, second = (anysize.plan(llama, preset=preset, **SIZES) for preset in ("split", "hypercloning"))
    interrupted(first, source, tmp_path / "out", 9, key="first")
    (staging_folder(tmp_path / "out") / "tokenizer").mkdir()
    assert len(write(second, source, tmp_path / "out", key="second")) == len(second.recipes)
    assert_same(weights_of(tmp_path / "out"), target_tensors(second, source))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda journal: journal[:-9], -1),  # the last line torn by a kill
        (lambda journal: journal + b'{"done": "model.layers.1', 0),  # a line begun and never ended
        (lambda journal: journal + b"not json\n", None),  # damaged: nothing in it is believed
        (lambda journal: journal + b"3\n", None),
        (lambda _: b"", None),
    ],
    ids=["torn", "begun", "garbage", "number", "empty"],
)
def test_a_damaged_journal_costs_work_and_never_the_result(
    llama: Path, tmp_path: Path, weights_of: Weights, damage: Callable[[bytes], bytes], kept: int | None
) -> None:
    plan, source = anysize.plan(llama, preset="split", **SIZES), Checkpoint(llama)
    interrupted(plan, source, tmp_path / "out", 6)
    journal = staging_folder(tmp_path / "out") / JOURNAL
    journal.write_bytes(damage(journal.read_bytes()))
    written = write(plan, source, tmp_path / "out")
    assert len(written) == len(plan.recipes) - (0 if kept is None else 6 + kept)
    assert_same(weights_of(tmp_path / "out"), target_tensors(plan, source))


def test_work_is_not_resumed_from_a_source_that_was_rewritten(
    new_llama: Run, tmp_path: Path, weights_of: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same config, same headers, other weights: a mixture of two models would pass for one."""
    folder = new_llama(tmp_path / "source", seed=1)
    plan = anysize.plan(folder, **SIZES)
    read, count = Checkpoint.read, 0

    def stopping(self: Checkpoint, name: str) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "read", stopping)
        with pytest.raises(KeyboardInterrupt):
            anysize.apply(plan, tmp_path / "out", verify="off")
    assert staging_folder(tmp_path / "out").is_dir()
    new_llama(folder, seed=2)
    anysize.apply(plan, tmp_path / "out", verify="off")
    assert_same(weights_of(tmp_path / "out"), target_tensors(plan, Checkpoint(folder)))


def test_a_second_run_into_the_same_output_is_refused(llama: Path, tmp_path: Path) -> None:
    plan, source = anysize.plan(llama, **SIZES), Checkpoint(llama)
    with CheckpointWriter(tmp_path / "out", plan.recipes, "plan", ONE_FILE) as first:
        with (
            pytest.raises(OutputError, match=r"another run is writing '.*/out' right now"),
            CheckpointWriter(tmp_path / "out", plan.recipes, "plan", ONE_FILE),
        ):
            pytest.fail("two writers in one folder")
        first.write(plan, source, allow_nonfinite=False, progress=lambda _: None)
        first.finish()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_headers_parse_with_the_safetensors_library_and_mixed_types_stay_aligned(llama: Path, tmp_path: Path) -> None:
    plan, source = anysize.plan(llama, **SIZES), Checkpoint(llama)
    kinds = ["F16", "F32", "BF16", "F64"]
    recipes = tuple(r.model_copy(update={"dtype": kinds[i % 4]}) for i, r in enumerate(plan.recipes))
    mixed = plan.model_copy(update={"recipes": recipes})
    write(mixed, source, tmp_path / "out", shard=60_000)
    wanted = target_tensors(mixed, source)
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        assert (8 + length) % 8 == 0
        assert header.pop("__metadata__") == {"format": "pt"}
        item = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
        assert all(entry["data_offsets"][0] % item[entry["dtype"]] == 0 for entry in header.values())
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(header)
            assert_same({n: file.get_tensor(n) for n in file.keys()}, {n: wanted[n] for n in header})  # noqa: SIM118


def test_shards_keep_the_order_and_the_limit(llama: Path) -> None:
    recipes = anysize.plan(llama, **SIZES).recipes
    for limit in (1, 5_000, 30_000, ONE_FILE):
        shards = shards_of(recipes, limit)
        assert [r for shard in shards for r in shard] == list(recipes)
        assert all(len(shard) == 1 or sum(r.num_bytes for r in shard) <= limit for shard in shards)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 KiB", 1536), ("2GiB", 2**31), ("77", 77), ("12B", 12)],
)
def test_sizes_are_read_as_users_write_them(text: str, size: int) -> None:
    assert parse_bytes(text) == size
