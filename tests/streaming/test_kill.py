"""A conversion killed at any moment leaves nothing that looks complete, and goes on where it stopped."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from anysize.executor import target_tensors
from anysize.io import writer
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.recipe import Options

SIZES = {"hidden_size": 768, "intermediate_size": 2048}
DRIVER = """
import sys
from pathlib import Path
from anysize.io import writer
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.recipe import Options

source = Checkpoint(Path(sys.argv[1]))
plan = make_plan(source, {"hidden_size": 768, "intermediate_size": 2048}, Options(preset="split"))
with writer.CheckpointWriter(Path(sys.argv[2]), plan.recipes, "driver", 30_000_000) as made:
    print("found", len(made.done), flush=True)
    made.write(plan, source, allow_nonfinite=False, progress=lambda _bytes: print("wrote", flush=True))
    made.add("config.json", b"{}")
    made.finish()
"""


# The command line, interrupted by itself once it has written some tensors: nobody outside meets that moment surely.
INTERRUPTED = """
import os, signal
from anysize.cli.main import main
from anysize.io import writer

# Of a shell's background jobs interrupts are ignored, and so they would be here.
signal.signal(signal.SIGINT, signal.default_int_handler)
record, count = writer.CheckpointWriter._record, 0

def counted(self, value):
    global count
    record(self, value)
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGINT)

writer.CheckpointWriter._record = counted
main()
"""


@pytest.fixture(scope="module")
def large(new_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of some tens of megabytes: its conversion takes long enough to be killed in the middle."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 499}
    return new_llama(tmp_path_factory.mktemp("large") / "source", **sizes)


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(source), str(output)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("number", "seed"), [*((signal.SIGKILL, seed) for seed in range(4)), (signal.SIGTERM, 4)])
def test_a_killed_run_is_resumed_to_the_same_bytes(
    large: Path, weights_of: Callable[[Path], dict[str, torch.Tensor]], tmp_path: Path, seed: int, number: int
) -> None:
    output = tmp_path / "out"
    process = start(large, output)
    assert process.stdout is not None
    wait = random.Random(seed)
    for _ in range(wait.randint(2, 60)):
        process.stdout.readline()
    time.sleep(wait.random() * 0.01)
    os.kill(process.pid, number)
    process.wait()
    process.stdout.close()
    assert process.returncode == -number
    assert not output.exists()
    assert not (writer.staging_folder(output) / "config.json").exists()
    again = start(large, output)
    out, _ = again.communicate(timeout=120)
    assert again.returncode == 0
    assert out.startswith("found ")
    assert int(out.split()[1]) > 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    source = Checkpoint(large)
    wanted = target_tensors(make_plan(source, SIZES, Options(preset="split")), source)
    found = weights_of(output)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_whole_command_that_is_interrupted_exits_130_and_goes_on(
    new_llama: Callable[..., Path], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "vocab_size": 499}
    source = new_llama(tmp_path / "source", head_dim=96, **sizes)
    asked = ["resize", str(source), str(tmp_path / "out"), "--hidden-size", "768", "--intermediate-size", "3072"]
    asked += ["--preset", "split", "--verify", "off"]
    journal = writer.staging_folder(tmp_path / "out") / writer.JOURNAL
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED, *asked], capture_output=True, text=True, timeout=120,
                             check=False)  # fmt: skip
    assert stopped.returncode == 130, stopped.stderr
    assert "the same command continues where it stopped" in stopped.stderr
    assert not (tmp_path / "out").exists()
    assert 4 <= journal.read_bytes().count(b"\n") < 12 * 9
    command = [str(Path(sys.executable).with_name("anysize")), *asked]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
