"""Storage types of safetensors as torch dtypes. Importing this imports torch."""

from __future__ import annotations

import torch

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
SAFETENSORS = {dtype: name for name, dtype in TORCH.items()}
