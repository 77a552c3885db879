"""What a model measures on held-out data, outside of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from anysize.training.start import load

if TYPE_CHECKING:
    from transformers import TrainingArguments


@torch.no_grad()
def held_out(location: str, data: Any, args: TrainingArguments) -> float:
    """Return the mean loss in nats/token of a model on sequences, or its error rate on images.

    args: of the runs that it is held against, for their device, precision and batches.
    """
    model: Any = load(location, torch.float32)
    model.to(args.device).eval()
    half = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast(args.device.type, half, enabled=bool(args.bf16 or args.fp16)):
        found = _mean(model, data, args.eval_batch_size, args.device)
    del model
    if args.device.type == "cuda":
        # Runs in other processes want the room.
        torch.cuda.empty_cache()
    return found


def _mean(model: Any, data: Any, batch: int, device: torch.device) -> float:
    total, count = 0.0, 0
    for first in range(0, len(data), batch):
        examples = [data[i] for i in range(first, min(first + batch, len(data)))]
        labels = torch.stack([example["labels"] for example in examples]).to(device)
        if "pixel_values" in examples[0]:
            pixels = torch.stack([example["pixel_values"] for example in examples])
            logits = model(pixel_values=pixels.to(device)).logits
            total += float((logits.argmax(-1) != labels).sum())
        else:
            total += float(model(input_ids=labels, labels=labels, use_cache=False).loss) * len(examples)
        count += len(examples)
    return total / count
