"""Self-data distillation: the teacher goes on from the beginning of each sequence, and the student learns its words.

Source: Thangarasa et al. 2024 (2410.09982), whose uncut source rewrites the answers of the fine-tuning data. Here every
sequence keeps its first tokens and has the rest from the teacher, sampled at a temperature.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anysize.io.whole import told_of_disk
from anysize.training.config import SelfData
from anysize.training.targets import StoredRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _draws(prompts: torch.Tensor, count: int) -> torch.Tensor:
    """Return numbers in [0, 1), float64 [batch, count], that each beginning alone decides.

    So the same beginning is always gone on with alike: in any batch, process, epoch or run.
    """
    rows = [
        np.random.Generator(np.random.SFC64(int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=16).digest())))
        for row in prompts.cpu().numpy().astype(np.int64)
    ]
    return torch.from_numpy(np.stack([row.random(count) for row in rows])).to(prompts.device)


@torch.no_grad()
def continued(model: PreTrainedModel, ids: torch.Tensor, options: SelfData) -> torch.Tensor:
    """Return sequences int64 [batch, length] of which all but the first tokens are the model's own."""
    callable_model: Any = model
    made = [ids[:, : options.prompt_tokens]]
    count = ids.shape[1] - options.prompt_tokens
    draws, cache = _draws(made[0], count), None
    for place in range(count):
        found = callable_model(input_ids=made[-1], past_key_values=cache, use_cache=True)
        cache, logits = found.past_key_values, found.logits[:, -1].double()
        if options.temperature:
            below = (logits / options.temperature).softmax(-1).cumsum(-1)
            # Rounding may leave the last sum a little below a draw.
            chosen = torch.searchsorted(below, draws[:, place, None].contiguous(), right=True).clamp(
                max=logits.shape[-1] - 1
            )
        else:
            chosen = logits.argmax(-1, keepdim=True)
        made.append(chosen)
    return torch.cat(made, dim=1)


class Continuations:
    """What a teacher says after the beginning of each sequence; with a folder, said once and read ever after."""

    def __init__(
        self, model: PreTrainedModel, options: SelfData, *, folder: str, identity: str, num_sequences: int | None,
        length: int, num_classes: int,
    ) -> None:  # fmt: skip
        self.model, self.options = model, options
        self.ids: StoredRows | None = None
        self._kept = partial(told_of_disk, f"distill.cache: '{folder}' cannot hold the teacher's words")
        if folder and num_sequences is not None:
            dtype, shape = "uint16" if num_classes <= 1 << 16 else "uint32", (num_sequences, length)
            key = json.dumps([identity, options.model_dump(), shape, dtype, 1])
            home = Path(folder).expanduser() / f"words-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
            with self._kept():
                home.mkdir(parents=True, exist_ok=True)
                self.ids = StoredRows(home / "ids", dtype, shape)
                self.there = StoredRows(home / "there", "uint8", (num_sequences,))

    def of(self, ids: torch.Tensor, sequences: torch.Tensor | None) -> torch.Tensor:
        """Return sequences with the teacher's words; their numbers say where those are kept."""
        if self.ids is None or sequences is None:
            return continued(self.model, ids, self.options)
        rows = sequences.cpu().numpy()
        with self._kept():
            silent = self.there[rows] == 0
            if bool(silent.any()):
                said = continued(self.model, ids[torch.from_numpy(silent).to(ids.device)], self.options)
                self.ids[rows[silent]] = said.cpu().numpy()
                self.there[rows[silent]] = np.ones(len(said))
            return torch.from_numpy(self.ids[rows].astype(np.int64)).to(ids.device)
