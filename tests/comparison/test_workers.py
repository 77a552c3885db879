"""The processes of a comparison: what fails in one of them, and what ends them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

# Arms are functions of the name: one fails at once, one is done at once, others take their time.
_WORK = r"""
import os, signal, sys, time
from types import SimpleNamespace
from anysize.comparison.workers import each, processes
from anysize.errors import InputError

def work(job):
    if job.arm == "bad":
        raise InputError("it cannot be")
    # In one piece, whoever else writes.
    os.write(1, f"at {job.arm} {os.getpid()}\n".encode())
    time.sleep({"quick": 0, "short": 2}.get(job.arm, 600))

def main():
    with processes(2) as pool:
        try:
            for arms in sys.argv[1:]:
                if arms == "kill":
                    os.kill(min(pool._processes), signal.SIGKILL)
                    time.sleep(1)
                else:
                    jobs = [SimpleNamespace(arm=arm) for arm in arms.split(",")]
                    each(pool, work, jobs, lambda number: os.write(1, f"done {number}\n".encode()))
        except InputError as error:
            print("raised", error, flush=True)

if __name__ == "__main__":
    main()
"""


def _begun(tmp_path: Path, *asked: str) -> subprocess.Popen[str]:
    script = tmp_path / "work.py"
    script.write_text(_WORK)
    return subprocess.Popen(
        [sys.executable, str(script), *asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _read(process: subprocess.Popen[str], lines: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(lines)]


def _end(process: subprocess.Popen[str], within: float = 60) -> tuple[list[str], str]:
    out, err = process.communicate(timeout=within)
    return out.splitlines(), err


@pytest.mark.parametrize("newest", [False, True])
def test_a_process_that_ends_without_a_word_is_told_of_while_the_other_works(tmp_path: Path, newest: bool) -> None:
    process = _begun(tmp_path, "quick", "slow,slower")
    # One process was enough for the first round; the pool begins the other one in the second.
    told = _read(process, 4)
    workers = sorted(int(line.split()[-1]) for line in told if line.startswith("at slow"))
    assert len(workers) == 2, told
    psutil.Process(workers[-1] if newest else workers[0]).kill()
    out, err = _end(process)
    assert out[-1].startswith("raised a process of the comparison ended without a word"), err
    assert not any(map(psutil.pid_exists, workers))


def test_a_process_that_ended_before_there_was_more_to_do_is_told_of(tmp_path: Path) -> None:
    out, err = _end(_begun(tmp_path, "quick,quick", "kill", "quick"))
    assert out[-1].startswith("raised a process of the comparison ended without a word"), err
    assert "Traceback" not in err


def test_what_failed_is_told_at_once_and_what_is_under_way_comes_to_its_end(tmp_path: Path) -> None:
    process = _begun(tmp_path, "short,bad")
    assert process.stderr is not None
    assert process.stderr.readline().strip() == (
        "anysize: arm 'bad': it cannot be; what is under way is brought to its end first"
    )
    assert process.poll() is None
    out, _ = _end(process)
    assert "done 1" in out
    assert out[-1] == "raised arm 'bad': it cannot be"


def test_an_interrupt_after_something_failed_ends_every_process(tmp_path: Path) -> None:
    process = _begun(tmp_path, "slow,bad")
    assert process.stderr is not None
    assert "arm 'bad'" in process.stderr.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode != 0
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
