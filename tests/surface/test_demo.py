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
