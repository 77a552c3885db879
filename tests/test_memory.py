"""Free memory is what a container leaves, not what its host has."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from anysize import memory


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 300\n"}, 400),
        ({"memory.max": "1000", "memory.current": "900"}, 100),
        ({"memory/memory.limit_in_bytes": "1000", "memory/memory.usage_in_bytes": "700",
          "memory/memory.stat": "inactive_file 9\ntotal_inactive_file 50\n"}, 350),
        ({"memory.max": "max", "memory.current": "900"}, None),
        ({}, None),
    ],
)  # fmt: skip
def test_what_a_container_leaves_is_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], left: int | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    if left is None:
        assert memory.free_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)
    else:
        assert memory.free_bytes() == left
        assert not memory.fits_in_memory(left)
