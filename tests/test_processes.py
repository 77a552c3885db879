"""Processes of one torchrun: how each of them leaves the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# A main thread that never hands over: threads of the backend are left with the last tensors until the very end.
_HURRIED = """
import atexit, sys
import torch
import torch.distributed as dist
from anysize.processes import leave_at_the_end

atexit.register(lambda: print("[in the group]" if dist.is_initialized() else "[has left]", flush=True))
{entering}
sys.setswitchinterval(1000)
for _ in range(50):
    work = dist.all_reduce(torch.ones(1000), async_op=True)
    work.wait()
    del work
"""
_BEGIN, _LEAVE = "dist.init_process_group('gloo')", "leave_at_the_end()"


def _two(path: Path, *entering: str) -> subprocess.CompletedProcess[str]:
    path.write_text(_HURRIED.format(entering="\n".join(entering)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_process_leaves_what_a_library_began_before_its_threads_could_abort_it(tmp_path: Path) -> None:
    # Without it, three of four such runs end in SIGABRT.
    done = _two(tmp_path / "left.py", _LEAVE, _BEGIN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("[has left]") == 2


def test_a_group_that_was_there_before_stays_its_owner_s(tmp_path: Path) -> None:
    done = _two(tmp_path / "owned.py", _BEGIN, _LEAVE)
    # One may be aborted for it before the other has come as far.
    assert "[in the group]" in done.stdout
    assert "[has left]" not in done.stdout
