"""What a training run takes on every device, before anything is loaded: weights, gradients, AdamW, activations, logits.

Counted as published (Korthikanti et al. 2022, 2205.05198, section 4; Rajbhandari et al. 2020, 1910.02054, section 3):
states are exact, activations an estimate for fused attention. FSDP divides the states, not the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from anysize.config import SourceConfig
from anysize.tensors import num_parameters

# Bytes of activations for each of hidden x tokens in a layer, in half precision and in single; attention is fused.
_HALF, _SINGLE = 34, 66


@dataclass(frozen=True)
class Memory:
    """Bytes on one device: what the optimizer keeps with the weights, the teacher, activations, and logits."""

    states: int
    teacher: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.states + self.teacher + self.activations + self.logits


def training_memory(
    config: SourceConfig, teacher: SourceConfig | None, *, batch: int, length: int, half: bool, checkpointing: bool,
    shards: int, apart: bool = False, weight_bytes: int = 4,
) -> Memory:  # fmt: skip
    """Return what training with AdamW takes on a device with so many sequences a step.

    half: computes in bfloat16 over float32 weights. checkpointing: only the stream before each layer is kept, and one
    layer at a time computed again. shards: over how many devices FSDP divides weights, gradients and optimizer. apart:
    new and old values take steps of their own, so a step keeps the weights from before it and which of them are new.
    weight_bytes: of a weight, and of its gradient and each of its moments. length: tokens of one sequence, places of
    one image.
    """
    sizes, width = config.sizes, 2 if half else 4
    stream = batch * length * sizes["hidden"]
    a_layer = stream * (_HALF if half else _SINGLE)
    activations = a_layer + stream * width * sizes["layer"] if checkpointing else a_layer * sizes["layer"]
    # Logits in the computing type; in single precision for the loss, for their logarithms and for the gradient.
    logits = batch * length * sizes.get("vocab", 0) * (width + 12)
    if teacher is not None:
        # The teacher's, and the gradient of the distance to them, which is found a part at a time.
        logits += batch * length * teacher.sizes.get("vocab", 0) * 2 * width
    states = num_parameters(config) * (4 * weight_bytes + (weight_bytes + 1 if apart else 0)) // shards
    return Memory(states, weight_bytes * num_parameters(teacher) if teacher else 0, activations, logits)
