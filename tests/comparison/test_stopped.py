"""A comparison that a full disk, a signal or a damaged file stops: it says so, and the same command goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from anysize.errors import InputError, OutputError
from tests.comparison.runs import carried_out, config_of
from tests.conftest import Ran
from tests.training.runs import written

Run = Callable[..., Ran]


def _small(llama: Path, story: Path, output: Path, **training: Any) -> dict[str, Any]:
    """One arm that is calibrated and one that is random, of one rate and seed each."""
    changes = {"arms": {"random": {"random": True}, "subspace": {"preset": "subspace"}}, "seeds": [0]}
    found = config_of(llama, story, output, learning_rates=[1e-3], workers=1, **changes)
    found["training"] |= training
    return found


def _command(path: Path) -> list[str]:
    return [sys.executable, "-m", "anysize", "compare", str(path), "--json"]


@pytest.mark.usefixtures("in_this_process")
def test_a_checkpoint_of_an_arm_that_cannot_be_saved_is_told_and_the_comparison_goes_on(
    llama: Path, story: Path, tmp_path: Path
) -> None:
    config = _small(llama, story, tmp_path / "out", save_steps=4)
    before = carried_out(config)
    folder = next(run.parent for run in (tmp_path / "out").glob("runs/*/run.json"))
    (folder / "run.json").unlink()
    # What lies in its place refuses it as a full disk would.
    (folder / "checkpoint-4").write_text("")
    told = r"^arm '(random|subspace)': cannot save the checkpoint '.*/checkpoint-4': File exists; make room"
    with pytest.raises(OutputError, match=told):
        carried_out(config)
    (folder / "checkpoint-4").unlink()
    assert [run.test for run in carried_out(config).runs] == [run.test for run in before.runs]


def test_a_cluster_whose_time_is_up_is_told_and_ends_every_process(llama: Path, story: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "c.yaml", _small(llama, story, tmp_path / "out", max_steps=100_000, save_steps=2))
    process = subprocess.Popen(_command(path), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    begun = psutil.Process(process.pid).children(recursive=True)
    assert begun
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 143
    assert told.splitlines()[-1] == "anysize: interrupted; the same command continues where it stopped"
    assert "Traceback" not in told
    _, alive = psutil.wait_procs(begun, timeout=30)
    assert not alive


def _damaged(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.usefixtures("in_this_process")
def test_a_damaged_file_of_a_comparison_is_one_sentence_and_its_fix_works(
    llama: Path, story: Path, tmp_path: Path
) -> None:
    config = _small(llama, story, tmp_path / "out")
    before = carried_out(config)
    files = [next((tmp_path / "out").glob(name)) for name in
             ("runs/*/run.json", "starts/*/made.json", "scores/*.json", "sources.json", "target.json")]  # fmt: skip
    for file in files[:-1]:
        _damaged(file)
        with pytest.raises(InputError, match=rf"'{file}' is damaged: .*; remove it, and the same command makes it"):
            carried_out(config)
        file.unlink()
        carried_out(config)
    # This one is written anew by every command.
    _damaged(files[-1])
    after = carried_out(config)
    assert [run.test for run in after.runs] == [run.test for run in before.runs]
    assert after.source == before.source


def test_a_damaged_record_of_a_comparison_is_refused_and_nothing_is_changed(
    llama: Path, story: Path, tmp_path: Path, cli: Run
) -> None:
    path = written(tmp_path / "c.yaml", _small(llama, story, tmp_path / "out"))
    (tmp_path / "out").mkdir()
    record = tmp_path / "out" / "comparison.json"
    record.write_text('{"source": ')
    done = cli("compare", path)
    assert done.code == 2
    assert f"'{record}' is damaged: " in done.err
    assert "choose another output, or put back the file as it was" in done.err
    assert [file.name for file in record.parent.iterdir()] == ["comparison.json"]
    record.write_text(json.dumps({"config": 1}))
    (tmp_path / "out" / "anysize-train.json").write_text("[]")
    record.unlink()
    ran = cli("train", written(tmp_path / "t.yaml", {"output": str(tmp_path / "out"), "model": str(llama),
                                                    "data": {"train": str(story), "sequence_length": 32},
                                                    "training": {"max_steps": 1}}))  # fmt: skip
    assert ran.code == 2
    assert "anysize-train.json' is damaged: wanted a JSON object with config, finished" in ran.err
