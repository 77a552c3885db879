"""The beginning of a safetensors file, as it is written; `reader` reads it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence


def header_bytes(
    tensors: Iterable[tuple[str, str, Sequence[int], int]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return what comes before the tensors, which follow in this order without a gap.

    tensors: (name, stored type such as "F32", shape, bytes). Padded, so that the first tensor is aligned.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape, num_bytes in tensors:
        begin, end = end, end + num_bytes
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
