"""Small files that appear whole or not at all, so that a killed process leaves nothing that looks complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def write_json(path: Path, told: Mapping[str, Any]) -> None:
    """Write a JSON object, and its folder where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole({path: (json.dumps(told, indent=1) + "\n").encode()})
