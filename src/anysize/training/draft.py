"""Draft models: a cut source, taught by the source alone, and measured as its assistant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from anysize.config import understand
from anysize.errors import InputError
from anysize.evals.drafting import Drafting, measure_drafting
from anysize.io.hub import open_checkpoint
from anysize.processes import rank_and_world
from anysize.progress import Progress
from anysize.training.config import TrainConfig
from anysize.training.data import datasets_of
from anysize.training.run import train
from anysize.training.start import folder_of, load


def make_draft(
    config: TrainConfig, *, num_prompts: int, new_tokens: int, num_drafted: int, command: str, progress: Progress
) -> tuple[dict[str, Any], Drafting] | None:
    """Train a draft and return the record of its training and what it is worth to its source.

    Of several processes, which train together, the first one alone measures; the others return None.
    Prompts are halves of held-out sequences, fewer than asked for where the held-out text is short. Raises InputError
    for images, and for what training refuses.
    """
    assert config.resize is not None
    tensors = open_checkpoint(config.resize.source)
    understood = understand(tensors.config)
    if understood.architecture.modality != "text":
        raise InputError(f"the source reads {understood.architecture.modality}s: only text is drafted")
    length = config.data.sequence_length // 2
    positions = understood.num_positions
    if positions is not None and length + new_tokens + num_drafted > positions:
        raise InputError(
            f"{length} tokens of prompt, {new_tokens} new ones and {num_drafted} drafted: the source has positions for "
            f"{positions}"
        )
    record = train(config, command=command, origin="anysize draft", progress=progress)
    if rank_and_world()[0]:
        return None
    # Here and not in the config: what is measured while training stays as it is, however many prompts are asked for.
    enough = max(config.data.evaluation_tokens, num_prompts * config.data.sequence_length)
    data = config.data.model_copy(update={"evaluation_tokens": enough})
    held_out: Any = datasets_of(data, understood, folder_of(tensors), 1, progress).held_out["validation"]
    rows = [held_out[i]["input_ids"][:length] for i in range(min(num_prompts, len(held_out)))]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models: list[Any] = [load(place, torch.float32) for place in (config.resize.source, str(Path(config.output)))]
    source, draft = (model.to(device) for model in models)
    progress("verify", 0, 1)
    found = measure_drafting(
        source, draft, torch.stack(rows).to(device), new_tokens=new_tokens, num_drafted=num_drafted
    )  # fmt: skip
    progress("verify", 1, 1)
    return record, found
