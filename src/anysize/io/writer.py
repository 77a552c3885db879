"""Write a checkpoint: header first, tensors streamed into place, a journal to resume by, and one rename at the end.

Everything is written into a hidden folder beside the output. It becomes the output by a rename, so that an
interrupted run leaves nothing that looks complete; the same command run again continues where it stopped.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil
import torch

from anysize.errors import OutputError
from anysize.executor import DimMaps, TensorJob
from anysize.io.lock import NO_LOCKS
from anysize.io.reader import INDEX_NAME, SINGLE_NAME, TensorInfo, TensorSource
from anysize.io.tensor_file import header_bytes
from anysize.recipe import BYTES, Plan, Recipe

JOURNAL = "journal.jsonl"
_WORKERS = 2


def shards_of(recipes: Iterable[Recipe], max_shard_bytes: int) -> list[list[Recipe]]:
    """Return the recipes in files of at most `max_shard_bytes` (a larger tensor has a file to itself), in order."""
    shards: list[list[Recipe]] = [[]]
    size = 0
    for recipe in recipes:
        if shards[-1] and size + recipe.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(recipe)
        size += recipe.num_bytes
    return shards


def parse_bytes(text: str) -> int:
    """Return the number of bytes that `5GB`, `500MB` or a plain number spells; raise OutputError otherwise."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}
    upper = text.strip().upper()
    unit = next((u for u in sorted(units, key=len, reverse=True) if upper.endswith(u)), "")
    try:
        size = int(float(upper[: len(upper) - len(unit)]) * units.get(unit, 1))
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise OutputError(f"shard size '{text}' is not a size: wanted something like 5GB or 500MB")
    return size


def _layout(recipes: list[Recipe], path: Path) -> tuple[bytes, dict[str, TensorInfo]]:
    """Return the header bytes of one file and where each tensor lies; wide types come first, so all stay aligned."""
    ordered = sorted(recipes, key=lambda r: -BYTES[r.dtype])
    header = header_bytes(((r.name, r.dtype, r.shape, r.num_bytes) for r in ordered), {"format": "pt"})
    infos: dict[str, TensorInfo] = {}
    end = len(header)
    for recipe in ordered:
        begin, end = end, end + recipe.num_bytes
        infos[recipe.name] = TensorInfo(recipe.dtype, recipe.shape, path, begin, end)
    return header, infos


def _aside(output: Path) -> Path:
    """Return where an output lies while another takes its place."""
    return output.parent / f".{output.name}.anysize-old"


def check_output(output: Path, num_bytes: int, *, overwrite: bool) -> None:
    """Refuse an output that is not empty, cannot be made, or does not fit on the disk, before any work."""
    aside = _aside(output.resolve())
    if aside.is_dir() and not output.exists() and staging_folder(output).is_dir():
        # A kill came between the two renames.
        aside.rename(output.resolve())
    # Or after them.
    shutil.rmtree(aside, ignore_errors=True)
    if output.exists() and not output.is_dir():
        raise OutputError(f"the output '{output}' exists and is not a folder")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"the output folder '{output}' is not empty: choose another one or pass --overwrite")
    if output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise OutputError(f"the output folder '{output}' holds no checkpoint, so --overwrite does not replace it")
    parent = next(p for p in (output.absolute().parent, *output.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"the output '{output}' cannot be made: '{parent}' is not a folder that we may write to")
    partial = staging_folder(output)
    done = sum(f.stat().st_blocks * 512 for f in partial.iterdir() if f.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + done
    if num_bytes > free:
        raise OutputError(f"the disk of '{output}' is too full: {num_bytes:,} bytes are needed, {free:,} are free")


def staging_folder(output: Path) -> Path:
    """Return the hidden folder beside the output in which it is made."""
    output = output.resolve()
    return output.parent / f".{output.name}.anysize-partial"


def _write_block(job: TensorJob, number: int, file: int, place: TensorInfo) -> int:
    """Make one block of rows and put it where it belongs; return its bytes."""
    data = job.block(number).contiguous().view(torch.uint8).reshape(-1).numpy().data
    row_bytes = (place.end - place.begin) // max(1, job.stored_rows)
    position = place.begin + number * job.block_rows * row_bytes
    written = 0
    while written < len(data):
        written += os.pwrite(file, data[written:], position + written)
    return written


class CheckpointWriter:
    """Makes one checkpoint folder: `write` streams the tensors, `add` the other files, `finish` renames.

    `fingerprint` identifies the plan and layout: work of another plan in the staging folder is thrown away. Use as
    a context manager: on an error the staging folder is removed; when the process is killed, it stays to be resumed.
    """

    def __init__(self, output: Path, recipes: tuple[Recipe, ...], fingerprint: str, max_shard_bytes: int) -> None:
        self.output = output.resolve()
        self.folder = staging_folder(output)
        shards = shards_of(recipes, max_shard_bytes)
        names = [SINGLE_NAME] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))
        ]  # fmt: skip
        self.recipes = [recipe for shard in shards for recipe in shard]
        self.headers: dict[Path, bytes] = {}
        self.places: dict[str, TensorInfo] = {}
        for name, shard in zip(names, shards, strict=True):
            self.headers[self.folder / name], places = _layout(shard, self.folder / name)
            self.places |= places
        # A journal outlives a killed process but not the machine: what the disk had not taken is lost then.
        self._key = {"fingerprint": f"{fingerprint}:{max_shard_bytes}", "boot": round(psutil.boot_time(), -2)}
        self._journal: int | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> CheckpointWriter:
        try:
            self._made_parents = [path for path in self.output.parents if not path.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = os.open(self.folder / JOURNAL, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            self._lock()
            self.done = self._resume()
        except OSError as error:
            self._discard()
            raise OutputError(f"cannot write '{self.output}': {error.strerror or error}") from error
        return self

    def _lock(self) -> None:
        assert self._journal is not None
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._journal)
            raise OutputError(f"another run is writing '{self.output}' right now") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warnings.warn(
                f"the file system of '{self.output}' has no locks: nothing keeps a second run out of it", stacklevel=3
            )

    def _discard(self) -> None:
        """Remove the staging folder and the parents that were made for it, and only then let go of the lock."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for parent in self._made_parents:
            with suppress(OSError):
                parent.rmdir()
        self._close()

    def _close(self) -> None:
        if self._journal is not None:
            os.close(self._journal)
            self._journal = None

    def _records(self) -> list[bytes]:
        """Return the journal's complete lines: what follows the last newline was cut off by a kill."""
        return (self.folder / JOURNAL).read_bytes().split(b"\n")[:-1]

    def _finished(self, lines: list[bytes]) -> set[str] | None:
        """Return the tensors that a journal calls written, or None where it is damaged or another plan's."""
        if not lines or lines[0] != self._line(self._key):
            return None
        try:
            return {json.loads(line)["done"] for line in lines[1:]}
        except (ValueError, KeyError, TypeError):
            return None

    def _resume(self) -> set[str]:
        """Return the tensors that an earlier run of the same plan wrote; start afresh after any other."""
        assert self._journal is not None
        lines = self._records()
        done = self._finished(lines) if all(path.is_file() for path in self.headers) else None
        for path in self.folder.iterdir():
            if path.name != JOURNAL and (done is None or path not in self.headers):
                path.unlink() if path.is_file() or path.is_symlink() else shutil.rmtree(path)
        os.ftruncate(self._journal, 0 if done is None else sum(len(line) + 1 for line in lines))
        if done is not None:
            return done
        for path, header in self.headers.items():
            path.write_bytes(header)
        self._record(self._key)
        return set()

    @staticmethod
    def _line(value: object) -> bytes:
        return json.dumps(value).encode()

    def _record(self, value: object) -> None:
        assert self._journal is not None
        os.write(self._journal, self._line(value) + b"\n")

    def write(
        self, plan: Plan, tensors: TensorSource, *, allow_nonfinite: bool, progress: Callable[[int], None]
    ) -> None:
        """Stream every tensor that is not there yet into its place; `progress` receives bytes as they are written.

        Memory: two source tensors and a few row blocks. Raises CheckpointError for NaN or Inf, OutputError when the
        disk fills up.
        """
        maps = DimMaps(plan.axes, plan.dense)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        files = {path: os.open(path, os.O_RDWR) for path in self.headers}
        try:
            with ThreadPoolExecutor(_WORKERS) as pool:
                self._stream(pool, plan, tensors, maps, files, allow_nonfinite=allow_nonfinite, progress=progress)
        except OSError as error:
            raise OutputError(f"cannot write '{self.output}': {error.strerror or error}") from error
        finally:
            torch.set_num_threads(threads)
            for file in files.values():
                os.close(file)
        self._write_index()

    def _stream(
        self,
        pool: ThreadPoolExecutor,
        plan: Plan,
        tensors: TensorSource,
        maps: DimMaps,
        files: dict[Path, int],
        *,
        allow_nonfinite: bool,
        progress: Callable[[int], None],
    ) -> None:
        """Read one tensor while the blocks of the one before are made and written."""
        before: tuple[str, list[Future[int]]] | None = None
        try:
            for recipe in self.recipes:
                if recipe.name in self.done:
                    progress(recipe.num_bytes)
                    continue
                source = tensors.read(recipe.source)
                job = TensorJob(recipe, source, maps, plan.seed, allow_nonfinite=allow_nonfinite)
                place = self.places[recipe.name]
                assert place.path is not None
                blocks = [pool.submit(_write_block, job, i, files[place.path], place) for i in range(job.num_blocks)]
                if before is not None:
                    self._finish_tensor(*before, progress)
                before = recipe.name, blocks
        finally:
            # Also when the next tensor cannot be read or the user stops: what is under way is kept.
            if before is not None and before[0] not in self.done:
                self._finish_tensor(*before, progress)

    def _finish_tensor(self, name: str, blocks: list[Future[int]], progress: Callable[[int], None]) -> None:
        for block in blocks:
            progress(block.result())
        self._record({"done": name})
        self.done.add(name)

    def _write_index(self) -> None:
        if len(self.headers) > 1:
            weight_map = {name: place.path.name for name, place in self.places.items() if place.path}
            total = sum(place.end - place.begin for place in self.places.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            self.add(INDEX_NAME, (json.dumps(index, indent=2) + "\n").encode())

    def add(self, name: str, data: bytes) -> None:
        """Put another file into the checkpoint."""
        try:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(data)
        except OSError as error:
            raise OutputError(f"cannot write '{self.output}': {error.strerror or error}") from error

    def finish(self) -> None:
        """Turn the staging folder into the output by a rename."""
        old = _aside(self.output)
        try:
            if self.output.is_dir() and any(self.output.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
                self.output.rename(old)
            # With the journal, which is the lock: until it has its name it can be taken up, and by nobody else.
            self.folder.rename(self.output)
            (self.output / JOURNAL).unlink()
        except OSError as error:
            if old.exists() and not self.output.exists():
                old.rename(self.output)
            raise OutputError(f"cannot put '{self.output}' into place: {error.strerror or error}") from error
        shutil.rmtree(old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Ctrl-C keeps the work, as a kill does: the same command resumes. Errors leave nothing behind.
        if error is None or isinstance(error, KeyboardInterrupt):
            self._close()
        else:
            self._discard()
