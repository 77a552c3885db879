"""A disk that is full in the middle of a run: one sentence, nothing half written, and the same command goes on."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from anysize.errors import InputError, OutputError
from anysize.io.whole import damaged, read_json, told_of_disk, write_json
from anysize.progress import quiet
from anysize.training.config import train_config
from anysize.training.run import train
from anysize.training.targets import TargetCache
from tests.training.runs import config_of, record, written
from tests.training.test_resume import asked_of


def limited(command: list[str], num_bytes: int | None, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command that may write files of so many bytes each: beyond, a disk refuses as a full one does."""

    def limit() -> None:
        if num_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return subprocess.run(
        command, capture_output=True, text=True, check=False, preexec_fn=limit, env={**os.environ, **env}
    )


def test_a_checkpoint_that_cannot_be_saved_is_told_and_the_run_goes_on(
    llama: Path, story: Path, tmp_path: Path, weights_of: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    size = (llama / "model.safetensors").stat().st_size
    path = written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out"))
    command = [sys.executable, "-m", "anysize", "train", str(path), "--json"]
    # The tokens are kept by a run that meets no limit.
    whole = limited([*command, "--set", f"output={tmp_path / 'whole'}"], None)
    assert whole.returncode == 0, whole.stderr
    for limit, why in ((size // 2, "File too large"), (size + size // 2, "not all of it could be written")):
        ran = limited(command, limit)
        assert ran.returncode == 2
        assert ran.stderr.splitlines()[-1].startswith(
            f"anysize: cannot save the checkpoint '{tmp_path}/out/checkpoint-4'"
        )
        assert why in ran.stderr
        assert "make room, and the same command goes on" in ran.stderr
        assert "Traceback" not in ran.stderr
        assert not list((tmp_path / "out").glob("checkpoint-*"))
        assert not (tmp_path / "out" / "model.safetensors").exists()
    again = limited(command, None)
    assert again.returncode == 0, again.stderr
    assert record(tmp_path / "out")["curve"] == record(tmp_path / "whole")["curve"]
    one, other = weights_of(tmp_path / "whole"), weights_of(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_that_cannot_be_saved_is_told(llama: Path, story: Path, tmp_path: Path) -> None:
    config = config_of(llama, story, tmp_path / "out")
    del config["training"]["save_steps"]
    config["training"]["save_strategy"] = "no"
    path = written(tmp_path / "c.yaml", config)
    command = [sys.executable, "-m", "anysize", "train", str(path), "--json"]
    ran = limited(command, (llama / "model.safetensors").stat().st_size // 2)
    assert ran.returncode == 2
    assert f"anysize: cannot save the trained model in '{tmp_path}/out': " in ran.stderr
    assert "Traceback" not in ran.stderr


def test_tokens_that_cannot_be_kept_are_told_and_nothing_of_them_stays(
    llama: Path, story: Path, tmp_path: Path
) -> None:
    path = written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out"))
    command = [sys.executable, "-m", "anysize", "train", str(path), "--json"]
    ran = limited(command, 20_000, ANYSIZE_CACHE=str(tmp_path / "cache"))
    assert ran.returncode == 2
    assert f"cannot keep the tokens of '{story}' in '{tmp_path}/cache/tokens/" in ran.stderr
    assert "File too large; set ANYSIZE_CACHE to a folder that can be written and has room" in ran.stderr
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size == 20_000]
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_kept_are_told_and_nothing_of_them_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path / "cache"))
    config = asked_of("vit", tmp_path, tmp_path / "out")
    whole, failing = np.save, True

    def save(place: Path, values: Any) -> None:
        whole(place, values)
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", save)
    asked = train_config(config, "c.yaml")
    with pytest.raises(OutputError, match=r"cannot keep the images of '.*' in '.*': No space left on device; set ANYS"):
        train(asked, command="", origin="c.yaml", progress=quiet)
    assert not list((tmp_path / "cache").rglob("writing*"))
    failing = False
    train(asked, command="", origin="c.yaml", progress=quiet)


def test_targets_that_cannot_be_kept_are_told_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TargetCache(tmp_path, "it", num_sequences=4, length=3, k=2, num_classes=10)
    found = torch.arange(12).reshape(2, 3, 2) % 10, torch.full((2, 3, 2), -1.5)
    rows = torch.tensor([2, 0])
    whole = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        # The first bytes still have room.
        return whole(file, data[:5], at) if len(data) > 6 else _no_room()

    def _no_room() -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match=r"^distill\.cache: '.*' cannot hold the targets: No space left on device$"):
        cache.of(rows, lambda: found)
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: whole(file, data[:5], at))
    # What was half written does not count, and what is written in parts is whole.
    for _ in range(2):
        classes, logs = cache.of(rows, lambda: found)
        assert torch.equal(classes, found[0])
        assert torch.equal(logs, found[1])
    again = TargetCache(tmp_path, "it", num_sequences=4, length=3, k=2, num_classes=10)
    classes, _ = again.of(rows, lambda: pytest.fail("they are there"))
    assert torch.equal(classes, found[0])


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("it ended"), "it ended"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), "the disk is full"),
    ],
)
def test_what_a_disk_refuses_is_one_sentence(error: Exception, why: str) -> None:
    with (
        pytest.raises(OutputError, match=rf"^cannot do it: .*{why}.*; mend it$"),
        told_of_disk("cannot do it", "mend it"),
    ):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), InputError("told already")])
def test_what_is_not_about_the_disk_goes_through(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)) as found, told_of_disk("cannot do it"):
        raise error
    assert found.value is error


def test_a_damaged_file_of_ours_is_one_sentence(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b.json"
    write_json(place, {"x": 1})
    assert read_json(place, "x") == {"x": 1}
    with pytest.raises(InputError, match=r"b\.json' is damaged: wanted a JSON object with x, y; remove it, and the sa"):
        read_json(place, "x", "y")
    for content in (b'{"x": ', b"\xff\xfe", b"[1]", b""):
        place.write_bytes(content)
        with pytest.raises(InputError, match=r"b\.json' is damaged: .*; put it back$"):
            read_json(place, fix="put it back")
    with pytest.raises(InputError, match=r"cannot read '.*c\.json': No such file"):
        read_json(tmp_path / "c.json")
    assert "is damaged: because" in str(damaged(place, "because"))
