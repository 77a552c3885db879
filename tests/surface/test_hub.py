"""Hub ids: resolved from the cache of this machine, offline, and named as ids in plans and cards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import anysize
from anysize.errors import CheckpointError
from anysize.io.hub import local_folder, open_checkpoint

Run = Callable[..., Any]
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as huggingface_hub lays it out: blobs, and a snapshot of links to them."""
    home = tmp_path / "home"
    repository = home / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / REVISION
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    for number, file in enumerate(sorted(llama.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home


def test_an_id_is_found_in_the_cache_and_gives_the_bytes_of_the_folder(hub: Path, llama: Path, tmp_path: Path) -> None:
    del hub
    for source, output in (("org/tiny", "by-id"), (llama, "by-folder")):
        anysize.resize(source, tmp_path / output, hidden_size=48, verify="off")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "by-id" / name).read_bytes() == (tmp_path / "by-folder" / name).read_bytes()


def test_an_id_stays_an_id_in_plan_and_card(hub: Path, tmp_path: Path) -> None:
    del hub
    plan = anysize.plan("org/tiny", hidden_size=48)
    assert plan.source.location == "org/tiny"
    anysize.apply(plan, tmp_path / "out", verify="off")
    assert (tmp_path / "out" / "README.md").read_text().startswith("---\nbase_model: org/tiny\n")


def test_like_takes_the_sizes_of_an_id(hub: Path, new_llama: Run, tmp_path: Path) -> None:
    del hub
    small = new_llama(tmp_path / "small", hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    assert anysize.plan(small, like="org/tiny").target_config["hidden_size"] == 32


def test_an_id_that_is_not_there_is_one_sentence(hub: Path) -> None:
    del hub
    with pytest.raises(CheckpointError, match="'org/absent' is not a folder here and could not be had from the Hub: "):
        anysize.plan("org/absent", hidden_size=48)


def test_a_snapshot_without_weights_is_refused(hub: Path) -> None:
    next((hub / "hub").rglob("model.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors and no model.safetensors.index.json"):
        anysize.plan("org/tiny", hidden_size=48)


def test_a_link_out_of_the_cache_is_refused(hub: Path, llama: Path) -> None:
    weights = next((hub / "hub").rglob("model.safetensors"))
    weights.unlink()
    weights.symlink_to(llama / "model.safetensors")
    with pytest.raises(CheckpointError, match="is a link that leaves the checkpoint folder"):
        open_checkpoint("org/tiny")


def test_hf_home_is_honoured_by_the_command(hub: Path, process: Run) -> None:
    found = process("plan", "org/tiny", "--hidden-size", 48, "--json", HF_HOME=str(hub))
    assert found.code == 0, found.err
    assert json.loads(found.out)["source"]["location"] == "org/tiny"
    absent = process("plan", "org/absent", "--hidden-size", 48, HF_HOME=str(hub))
    assert (absent.code, absent.out) == (2, "")
    assert absent.err.startswith("anysize: 'org/absent' is not a folder here and could not be had from the Hub: ")
    assert absent.err.count("\n") == 1


@pytest.mark.parametrize("name", ["no such", "../up", "a/b/c", "//"])
def test_what_is_neither_folder_nor_id_is_refused_without_asking(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is not a folder, and not a Hub id|is not a checkpoint"):
        open_checkpoint(name)


def test_a_folder_wins_over_an_id(hub: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    del hub
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, tmp_path / "org" / "tiny")
    assert local_folder("org/tiny") == Path("org/tiny")
    assert open_checkpoint("org/tiny").location == str(tmp_path / "org" / "tiny")
