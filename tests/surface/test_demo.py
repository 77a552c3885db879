"""The demo, with a second of pretraining: it grows what it pretrained, and both say the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def test_the_demo_grows_what_it_pretrained_and_loses_nothing(process: Callable[..., Any], tmp_path: Path) -> None:
    ran = process("demo", "-o", tmp_path / "demo", "--seconds", 2, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    source, grown = found["source"], found["grown"]
    assert found["exact"]
    assert found["proof_passed"]
    assert grown["num_parameters"] > 1.5 * source["num_parameters"]
    assert abs(grown["loss_nats_per_token"] - source["loss_nats_per_token"]) < 1e-4
    assert source["loss_nats_per_token"] < 6.9  # the logarithm of the vocabulary: it has learned something
    assert grown["text"] == source["text"]
    assert "all proofs passed" in ran.err
    assert (tmp_path / "demo" / "grown" / "anysize.json").is_file()


def test_the_demo_replaces_only_what_a_demo_made(tmp_path: Path) -> None:
    import pytest

    from anysize.demo import _make_room
    from anysize.errors import OutputError

    mine = tmp_path / "mine"
    (mine / "source").mkdir(parents=True)
    (mine / "source" / "thesis").write_text("kept")
    with pytest.raises(OutputError, match="holds something that no demo has made"):
        _make_room(mine, (mine / "source",))
    assert (mine / "source" / "thesis").read_text() == "kept"
    for _ in range(2):
        _make_room(tmp_path / "new", (tmp_path / "new" / "source",))
        (tmp_path / "new" / "source").mkdir()
