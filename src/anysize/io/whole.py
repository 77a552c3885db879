"""Files that appear whole or not at all, so that a killed process leaves nothing that looks complete; and what is
said where a disk refuses them, or where one that we wrote is damaged since."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from anysize.errors import InputError, OutputError

# How torch says that not all of a file could be written.
_TORCH_WRITING = ("inline_container", "PytorchStreamWriter", "file write failed")
# How all of them say that there is no room, and nothing else is amiss.
_NO_ROOM = ("No space left", "quota exceeded", "File too large", "because the disk is full")

# What mends a want of room for temporary files.
MOVE_SCRATCH = "set TMPDIR to a folder with room"


@contextmanager
def told_of_disk(what: str, fix: str = "") -> Generator[None]:
    """While active, what a disk refuses is one sentence, an OutputError: what cannot be done, why, and the fix.

    Whether Python says so, safetensors or torch, which each raise their own.
    """
    try:
        yield
    except Exception as error:
        why = _refusal_of_disk(error)
        if why is None:
            raise
        raise OutputError(f"{what}: {why}{fix and '; '}{fix}") from error


@contextmanager
def scratch_folder() -> Generator[Path]:
    """Give a folder for a while, under TMPDIR; raise OutputError, which names it, where there is no room for it."""
    with told_of_disk("there is no folder for temporary files", MOVE_SCRATCH):
        place = tempfile.TemporaryDirectory()
    with place as name:
        try:
            yield Path(name)
        except Exception as error:
            why = _refusal_of_disk(error) or ""
            elsewhere = isinstance(error, OSError) and error.filename and name not in str(error.filename)
            if elsewhere or not any(sign in why for sign in _NO_ROOM):
                raise
            raise OutputError(f"no room for temporary files in '{Path(name).parent}': {why}; {MOVE_SCRATCH}") from error


def _refusal_of_disk(error: Exception) -> str | None:
    """Return why a disk refuses, None where an error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or " ".join(str(error).split())
    told = " ".join(str(error).split())
    # By its name: safetensors is not imported for a file of text.
    if type(error).__name__ == "SafetensorError":
        return told
    if isinstance(error, RuntimeError) and any(sign in told for sign in _TORCH_WRITING):
        return f"not all of it could be written, most often because the disk is full ({told[:120]})"
    return None


def write_whole(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all of them are on disk before the first takes its place.

    Raises OSError, after which what was half written is gone.
    """
    partial = {place: place.with_name(f".{place.name}.partial") for place in contents}
    try:
        for place, content in contents.items():
            partial[place].write_bytes(content)
        for place, name in partial.items():
            name.replace(place)
    except OSError:
        for name in partial.values():
            name.unlink(missing_ok=True)
        raise


def write_json(path: Path, told: Mapping[str, Any], fix: str = "") -> None:
    """Write a JSON object, and its folder where there is none; raise OutputError, with the fix, where that fails."""
    with told_of_disk(f"cannot write '{path}'", fix):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole({path: (json.dumps(told, indent=1) + "\n").encode()})


MADE_AGAIN = "remove it, and the same command makes it again"


def read_json(path: Path, *wanted: str, fix: str = MADE_AGAIN) -> dict[str, Any]:
    """Return the JSON object of a file that `write_json` wrote, with the keys that are wanted.

    Raises InputError, with the fix, where it cannot be read or is something else by now.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is not valid JSON ({error})", fix) from error
    if not isinstance(found, dict) or not set(wanted) <= set(found):
        raise damaged(path, f"wanted a JSON object{' with ' if wanted else ''}{', '.join(wanted)}", fix)
    return found


def damaged(path: Path, why: str, fix: str = MADE_AGAIN) -> InputError:
    """Return what is raised for a file of ours that is not as we wrote it."""
    return InputError(f"'{path}' is damaged: {why}; {fix}")
