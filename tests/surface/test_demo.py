"""The demo, with two seconds of pretraining: the whole story, told by plain models and two reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from anysize.demo.material import make_room
from anysize.errors import OutputError
from anysize.report.schema import Results


def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    place = tmp_path / "demo"
    command = [sys.executable, "-m", "anysize", "demo", "-o", str(place), "--seconds", "1", "--json"]
    # Five processes' worth of training: on a busy machine it takes long, and nothing here asserts a time.
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["exact"]
    assert found["proof_passed"]
    assert found["grown"]["num_parameters"] > 1.5 * found["young"]["num_parameters"]
    assert found["grown"]["text"] == found["young"]["text"]
    assert "all proofs passed" in ran.stderr
    for name in ("shrink", "grow"):
        results = Results.load(place / name)
        assert results.complete
        assert results.rows[0].arm == "random"
        assert "<html" in (place / name / "report.html").read_text(encoding="utf-8")
    shrunk = Results.load(place / "shrink")
    # What is cut out of a source that has learned something starts ahead of a random model.
    assert shrunk.rows[1].before < shrunk.rows[0].before
    assert shrunk.source is not None
    assert shrunk.source.test < 6.9  # the logarithm of the vocabulary
    assert json.loads((place / "source" / "config.json").read_text())["model_type"] == "llama"


def test_the_demo_replaces_only_what_a_demo_made(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    (mine / "source").mkdir(parents=True)
    (mine / "source" / "thesis").write_text("kept")
    with pytest.raises(OutputError, match="holds something that no demo has made"):
        make_room(mine, (mine / "source",))
    assert (mine / "source" / "thesis").read_text() == "kept"
    for _ in range(2):
        make_room(tmp_path / "new", (tmp_path / "new" / "source",))
        (tmp_path / "new" / "source").mkdir()
