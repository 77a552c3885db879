"""Where work is kept that has no output to lie beside."""

from __future__ import annotations

import os
from pathlib import Path

# What to do where it cannot be written.
MOVE_CACHE = "set ANYSIZE_CACHE to a folder that can be written and has room"


def cache_folder() -> Path:
    """Return $ANYSIZE_CACHE, or `anysize` in $XDG_CACHE_HOME or ~/.cache; it need not be there yet."""
    if own := os.environ.get("ANYSIZE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "anysize"
