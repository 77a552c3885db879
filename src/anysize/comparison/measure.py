"""What a model measures on held-out data, outside of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import cross_entropy

from anysize.training.start import load

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from anysize.training.data import Datasets


class Figure(BaseModel):
    """What a model measures: the mean loss in nats/token, or the error rate on images, as runs are measured.

    of_text: of that loss, the mean over what is neither an end token between documents nor right after one. A model
    that has never seen such a token can do nothing about those. Where there is nothing else, it is all of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    of_text: float


@torch.no_grad()
def held_out(location: str, data: Datasets, split: str, args: TrainingArguments) -> Figure:
    """Return what a model measures on held-out data of this name.

    args: of the runs that it is held against, for their device, precision and batches.
    """
    model: Any = load(location, torch.float32)
    model.to(args.device).eval()
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, half, enabled=bool(args.bf16 or args.fp16)):
        found = _measured(model, data.held_out[split], data.end_token, args.eval_batch_size, args.device)
    del model
    if args.device.type == "cuda":
        # Runs in other processes want the room.
        torch.cuda.empty_cache()
    return found


def _measured(model: Any, data: Any, end: int | None, batch: int, device: torch.device) -> Figure:
    # Sums and counts, of everything and of text alone.
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for first in range(0, len(data), batch):
        examples = [data[i] for i in range(first, min(first + batch, len(data)))]
        labels = torch.stack([example["labels"] for example in examples]).to(device)
        if "pixel_values" in examples[0]:
            pixels = torch.stack([example["pixel_values"] for example in examples])
            found = (model(pixel_values=pixels.to(device)).logits.argmax(-1) != labels).float()
            text = torch.ones_like(found, dtype=torch.bool)
        else:
            logits = model(input_ids=labels, use_cache=False).logits[:, :-1].float()
            found = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
            ends = torch.zeros_like(labels, dtype=torch.bool) if end is None else labels == end
            text = ~(ends[:, 1:] | ends[:, :-1])
        for i, counted in enumerate((found, found[text])):
            # Not every accelerator has double precision.
            sums[i] += counted.cpu().double().sum()
            counts[i] += counted.numel()
    value, of_text = (sums / counts).tolist()
    return Figure(value=value, of_text=of_text if counts[1] else value)
