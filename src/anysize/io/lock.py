"""One process at a time in a folder of runs: the lock dies with the process, however that ends."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from anysize.errors import OutputError


class FolderLock:
    """The lock of a folder, held until it is released or this process ends; it leaves no file where it is released.

    Raises OutputError where another process holds it. File systems without locks let everyone in.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._lock = FileLock(self._path)
        try:
            with contextlib.suppress(NotImplementedError):
                self._lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"another process is at work in '{folder}': wait for it, or choose another output"
            ) from error

    def release(self) -> None:
        """Let another process in."""
        # In this order: the file of one who came in between is not removed.
        self._path.unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
