"""One process at a time: who comes second is refused, and where there are no locks everyone is told."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest

import anysize
from anysize.errors import OutputError
from anysize.io.lock import FolderLock


def _failing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "said the file system")

    monkeypatch.setattr(fcntl, "flock", flock)


def test_the_second_is_refused_and_let_in_once_the_first_is_done(tmp_path: Path) -> None:
    with FolderLock(tmp_path), pytest.raises(OutputError, match="another process is at work in"):
        FolderLock(tmp_path)
    assert not list(tmp_path.iterdir())
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_everyone_is_let_in_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    _failing(monkeypatch, number)
    for _ in range(2):
        with pytest.warns(UserWarning, match="nothing keeps a second process out"):
            lock = FolderLock(tmp_path)
        assert not list(tmp_path.iterdir())
        lock.release()


def test_a_folder_is_written_where_there_are_no_locks(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _failing(monkeypatch, errno.ENOLCK)
    with pytest.warns(UserWarning, match="nothing keeps a second run out"):
        anysize.resize(llama, tmp_path / "out", intermediate_size=96)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_locked_for_another_reason_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing(monkeypatch, errno.EIO)
    with pytest.raises(OutputError, match="cannot be locked: said the file system"):
        FolderLock(tmp_path)
