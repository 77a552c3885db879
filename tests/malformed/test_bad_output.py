"""Places that cannot be written: refused before any work, and cleaned up where they fail in the middle."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.errors import CheckpointError, InputError, OutputError
from anysize.io.whole import scratch_folder
from anysize.io.writer import staging_folder

Run = Callable[..., Any]
SIZES = {"intermediate_size": 61}


def test_parents_are_made_as_mkdir_p_does(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    assert anysize.resize(llama, output, verify="off", **SIZES) == output
    assert (output / "model.safetensors").is_file()
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_an_empty_folder_and_a_link_to_one_are_filled(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    anysize.resize(llama, tmp_path / "link", verify="off", **SIZES)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real"]


def test_a_link_into_the_source_is_the_source(new_llama: Run, tmp_path: Path) -> None:
    source = new_llama(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(OutputError, match="lie in one another"):
        anysize.resize(source, tmp_path / "link", overwrite=True, **SIZES)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere; the next test covers the same sentence")
def test_a_parent_without_write_permission_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(OutputError, match="is not a folder that we may write to"):
        anysize.resize(llama, tmp_path / "locked" / "out", **SIZES)


def test_a_parent_that_may_not_be_written_to_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda _path, mode: mode != os.W_OK)
    with pytest.raises(OutputError, match=f"cannot be made: '{tmp_path}' is not a folder that we may write to"):
        anysize.resize(llama, tmp_path / "out", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_makes_no_folders_is_one_sentence(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(llama)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"^cannot write '/proc/anysize-out': No such file or directory$"):
        anysize.resize(llama, "/proc/anysize-out", verify="off", **SIZES)


@pytest.mark.parametrize("failing", ["write_bytes", "rename"])
def test_a_disk_that_fails_before_and_after_the_tensors_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """`write_bytes` fails while headers are written, `rename` when all is done."""

    def full(_path: Path, _argument: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, failing, full)
    with pytest.raises(OutputError, match="No space left on device"):
        anysize.resize(llama, tmp_path / "new" / "out", verify="off", **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_what_was_to_be_overwritten_comes_back_if_the_last_step_fails(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", Path.rename
    output.mkdir()
    (output / "precious").write_text("kept")
    (output / "config.json").write_text("{}")

    def refuse(path: Path, target: Path) -> Path:
        if path == staging_folder(output):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match=r"cannot put '.*' into place: Input/output error"):
        anysize.resize(llama, output, verify="off", overwrite=True, **SIZES)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (output / "precious").read_text() == "kept"


def test_only_a_checkpoint_is_overwritten(llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "thesis"
    output.mkdir()
    (output / "chapter").write_text("kept")
    with pytest.raises(OutputError, match="holds no checkpoint, so --overwrite does not replace it"):
        anysize.resize(llama, output, verify="off", overwrite=True, **SIZES)
    assert (output / "chapter").read_text() == "kept"


@pytest.mark.parametrize("output", ["", ".", ".."])
def test_the_current_folder_is_no_output(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "precious").write_text("kept")
    monkeypatch.chdir(here)
    with pytest.raises(OutputError, match="is the current folder or holds it"):
        anysize.resize(llama, output, verify="off", overwrite=True, **SIZES)
    assert (here / "precious").read_text() == "kept"


def test_a_value_that_scaling_carries_beyond_half_precision_is_refused(new_llama: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = new_llama(tmp_path / "source", dtype="float16")
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"][0, 0] = 60000.0
    save_file(state, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="has values that float16 cannot store once it is made"):
        anysize.resize(source, tmp_path / "out", hidden_size=48, verify="off")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_that_vanishes_while_it_is_read_is_named(
    new_llama: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = new_llama(tmp_path / "source")
    plan = anysize.plan(source, **SIZES)
    monkeypatch.setattr("anysize.proof.miniature.prove_on_miniature", lambda _: (_remove(source), _passing())[1])
    with pytest.raises(CheckpointError, match=r"^cannot read '.*model\.safetensors': No such file or directory$"):
        anysize.apply(plan, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def _remove(source: Path) -> None:
    (source / "model.safetensors").unlink()


def _passing() -> Any:
    from anysize.proof.verdict import Verification

    return Verification(checks=())


@pytest.mark.parametrize("size", ["", "big", "0", "-1GB", "nanGB", "infGB", "5XB"])
def test_a_shard_size_that_is_no_size_is_refused(llama: Path, tmp_path: Path, size: str) -> None:
    with pytest.raises(OutputError, match=f"shard size '{size}' is not a size: wanted something like 5GB or 500MB"):
        anysize.resize(llama, tmp_path / "out", max_shard_size=size, **SIZES)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_verify_mode_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="verify 'none' is unknown: wanted auto, full, off"):
        anysize.resize(llama, tmp_path / "out", verify="none", **SIZES)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("count", ["many", "0", "-3M", "infM", "nanB", "1e400"])
def test_a_count_that_is_no_count_is_refused(llama: Path, cli: Run, count: str) -> None:
    ran = cli("plan", llama, "--num-params", count)
    assert ran.code == 2
    assert ran.err == f"anysize: num_params '{count}' is not a count: wanted something like 350M or 1.3B\n"


@pytest.mark.parametrize("scale", ["nan", "inf", "0", "-2"])
def test_what_is_no_scale_is_refused(llama: Path, cli: Run, scale: str) -> None:
    ran = cli("plan", llama, "--scale", scale)
    assert ran.code == 2
    assert ran.err.endswith(": wanted a number above 0\n")


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [("--scale", "1e308", "scale 1e+308: wanted a number below 2^24, as sizes are"),
     ("--num-params", "1e305K", "wanted at most 162,940,321,792, 2^23 times what the source has"),
     ("--num-params", "9" * 400, "wanted at most 162,940,321,792, 2^23 times what the source has")],
    ids=["scale", "a float", "an integer"],
)  # fmt: skip
def test_what_is_too_large_to_multiply_is_refused(llama: Path, cli: Run, option: str, value: str, why: str) -> None:
    ran = cli("plan", llama, option, value)
    assert ran.code == 2
    assert ran.err.startswith("anysize: ")
    assert ran.err.endswith(f"{why}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("preset", ["hypercloning", "hypercloning-noisy", "split", "fresh"])
def test_weights_that_are_not_finite_go_where_the_source_has_them_if_allowed(
    new_llama: Run, tmp_path: Path, cli: Run, value: float, preset: str
) -> None:
    source = new_llama(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    asked = ("resize", source, tmp_path / "out", "--intermediate-size", 96, "--preset", preset, "--verify", "off")
    assert cli(*asked).code == 2
    ran = cli(*asked, "--allow-nonfinite", "--json")
    assert ran.code == 0, ran.err
    bad = ~load_file(tmp_path / "out" / "model.safetensors")[name].isfinite()
    rows, columns = bad.nonzero(as_tuple=True)
    assert set(rows.tolist()) == {3}
    assert set(columns.tolist()) == ({5} if preset == "fresh" else {5, 53})
    others = {n: t for n, t in load_file(tmp_path / "out" / "model.safetensors").items() if n != name}
    assert all(bool(torch.isfinite(t).all()) for t in others.values())


def test_no_room_for_what_a_proof_saves_for_a_while_is_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    with monkeypatch.context() as context:
        context.setattr("transformers.PreTrainedModel.save_pretrained", full)
        with pytest.raises(OutputError) as error:
            anysize.resize(llama, tmp_path / "out", verify="full", **SIZES)
    told = f"no room for temporary files in '{tmp_path}/scratch': No space left on device; set TMPDIR to a folder with"
    assert told in str(error.value)
    assert not list((tmp_path / "scratch").iterdir())
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(OutputError, match="there is no folder for temporary files: No such file or directory; set TMP"):
        anysize.resize(llama, tmp_path / "out", verify="full", **SIZES)


@pytest.mark.parametrize("error", [
    FileNotFoundError(errno.ENOENT, "No such file or directory"),
    OSError(errno.ENOSPC, "No space left on device", "/elsewhere/cache/a.arrow"),
])  # fmt: skip
def test_what_has_nothing_to_do_with_temporary_files_is_not_blamed_on_them(error: OSError) -> None:
    with pytest.raises(type(error)) as told, scratch_folder():
        raise error
    assert told.value is error
