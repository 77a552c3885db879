"""The command line in processes that shard a model on the CPU.

accelerate shards models on accelerators alone, torch does it anywhere. Here every process is told to be one of several
accelerators whose device is the CPU, so that what follows is FSDP2 as accelerate, transformers and torch carry it out.
"""

from __future__ import annotations

from typing import Any

import accelerate.state
import torch
from accelerate.utils import DistributedType

from anysize.cli.main import main


def _as_accelerator(*_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_XPU


def _on_the_cpu(self: Any) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    accelerate.state.PartialState._prepare_backend = _as_accelerator  # type: ignore[method-assign]
    accelerate.state.PartialState.set_device = _on_the_cpu  # type: ignore[method-assign]
    main()
