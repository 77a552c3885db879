"""What a model measures on held-out data, outside of training."""

from __future__ import annotations

from typing import Any

import torch

from anysize.training.start import load

_BATCH = 16


@torch.no_grad()
def held_out(location: str, data: Any, device: torch.device) -> float:
    """Return the mean loss in nats/token of a model on sequences, or its error rate on images."""
    model: Any = load(location, torch.float32)
    model.to(device).eval()
    total, count = 0.0, 0
    for first in range(0, len(data), _BATCH):
        examples = [data[i] for i in range(first, min(first + _BATCH, len(data)))]
        labels = torch.stack([example["labels"] for example in examples]).to(device)
        if "pixel_values" in examples[0]:
            pixels = torch.stack([example["pixel_values"] for example in examples])
            logits = model(pixel_values=pixels.to(device)).logits
            total += float((logits.argmax(-1) != labels).sum())
        else:
            total += float(model(input_ids=labels, labels=labels, use_cache=False).loss) * len(examples)
        count += len(examples)
    return total / count
