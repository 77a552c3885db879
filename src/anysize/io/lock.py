"""One process at a time in a folder of runs, or at one file: the lock dies with the process, however that ends."""

from __future__ import annotations

import contextlib
import errno
import warnings
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from anysize.errors import OutputError

_NAME = ".lock"
# What a file system says that knows no locks: some network and user-space ones.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


class FolderLock:
    """The lock of an output, held until it is released or this process ends; it leaves no file where it is released.

    It lies in the folder that the output is or, for a file, where `lock` says.

    Raises OutputError where another process holds it, or where it cannot be written. File systems without locks let
    everyone in, with a warning.
    """

    def __init__(self, output: Path, lock: Path | None = None) -> None:
        self._path = output / _NAME if lock is None else lock
        self._lock = FileLock(self._path, fallback_to_soft=False)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"another process is at work {'in' if lock is None else 'on'} '{output}': wait for it, or choose "
                "another output"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise OutputError(f"the output '{output}' cannot be locked: {error.strerror or error}") from error
            self._path.unlink(missing_ok=True)
            warnings.warn(
                f"the file system of '{output}' has no locks: nothing keeps a second process out of it", stacklevel=2
            )

    @classmethod
    def of_runs(cls, folder: Path, record: str, what: str) -> FolderLock:
        """Make and lock a folder for something that keeps such a record in it.

        Raises OutputError for a file, and for a folder that holds something else.
        """
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"the output '{folder}' exists and is not a folder")
        if folder.is_dir() and not (folder / record).is_file() and {path.name for path in folder.iterdir()} - {_NAME}:
            raise OutputError(f"the output folder '{folder}' is not empty and holds no {what}: choose another one")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the output folder '{folder}' cannot be made: {error.strerror or error}") from error
        return cls(folder)

    def release(self) -> None:
        """Let another process in."""
        # Removed first: the file of one who comes in between is another one.
        if self._lock.is_locked:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
