"""Self-data distillation: the teacher goes on from the beginning of each sequence, and the student learns its words.

Source: Thangarasa et al. 2024 (2410.09982), whose uncut source rewrites the answers of the fine-tuning data. Here every
sequence keeps its first tokens and has the rest from the teacher, sampled at a temperature.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from anysize.errors import InputError
from anysize.training.config import SelfData
from anysize.training.targets import stored_array

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def continued(model: PreTrainedModel, ids: torch.Tensor, options: SelfData, seed: int) -> torch.Tensor:
    """Return sequences int64 [batch, length] of which all but the first tokens are the model's own.

    A seed gives the same tokens again and leaves the random state of the run as it was.
    """
    callable_model: Any = model
    made = [ids[:, : options.prompt_tokens]]
    with torch.random.fork_rng(devices=[ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        cache: Any = None
        while sum(part.shape[1] for part in made) < ids.shape[1]:
            found = callable_model(input_ids=made[-1], past_key_values=cache, use_cache=True)
            cache, logits = found.past_key_values, found.logits[:, -1].float()
            if options.temperature:
                chosen = torch.multinomial((logits / options.temperature).softmax(-1), 1)
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
        if options.prompt_tokens >= length:
            raise InputError(
                f"distill.self_data.prompt_tokens is {options.prompt_tokens}, and a sequence has {length}: the teacher "
                "would have nothing to say"
            )
        self.model, self.options = model, options
        self.ids: np.ndarray[Any, Any] | None = None
        if folder and num_sequences is not None:
            dtype, shape = "uint16" if num_classes <= 1 << 16 else "uint32", (num_sequences, length)
            key = json.dumps([identity, options.model_dump(), shape, dtype, 1])
            home = Path(folder).expanduser() / f"words-{hashlib.sha256(key.encode()).hexdigest()[:24]}"
            try:
                home.mkdir(parents=True, exist_ok=True)
                self.ids = stored_array(home / "ids", dtype, shape)
                self.there = stored_array(home / "there", "uint8", (num_sequences,))
            except OSError as error:
                raise InputError(f"distill.cache: '{folder}' cannot hold the teacher's words: {error}") from error

    def of(self, ids: torch.Tensor, sequences: torch.Tensor | None, seed: int) -> torch.Tensor:
        """Return sequences with the teacher's words; their numbers say where those are kept."""
        if self.ids is None or sequences is None:
            return continued(self.model, ids, self.options, seed)
        rows = sequences.cpu().numpy()
        if not bool(self.there[rows].all()):
            self.ids[rows] = continued(self.model, ids, self.options, seed).cpu().numpy().astype(self.ids.dtype)
            self.there[rows] = 1
        return torch.from_numpy(self.ids[rows].astype(np.int64)).to(ids.device)
