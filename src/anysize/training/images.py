"""Images with labels: decoded once and kept on disk as bytes, handed out as pixels in -1..1."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from anysize.calibration.data import _rows
from anysize.errors import InputError, joined
from anysize.training.tokens import cache_folder, data_identity

Example = dict[str, torch.Tensor]
Progress = Callable[[str, int, int], None]


def _decoded(row: Mapping[str, Any], size: int, channels: int, data: str) -> np.ndarray[Any, Any]:
    """Return one image as bytes [channels, size, size]."""
    from PIL import Image  # noqa: PLC0415

    value = next((v for v in row.values() if isinstance(v, dict | bytes) or hasattr(v, "convert")), None)
    raw = value.get("bytes") if isinstance(value, dict) else value
    if raw is None:
        raise InputError(f"the data '{data}' hold no images, and this model reads images: columns {joined(row)}")
    try:
        image: Any = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
        pixels = np.asarray(image.convert("L" if channels == 1 else "RGB").resize((size, size)))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the data '{data}' hold an image that cannot be read: {error}") from error
    return pixels.reshape(size, size, channels).transpose(2, 0, 1)


class Images(Dataset[Example]):
    """Labelled images: {pixel_values: float32 [channels, size, size] in -1..1, labels: int64}, and their number.

    Raises InputError where there are no images or labels, labels that the model does not have, or fewer than `least`.
    """

    def __init__(
        self, data: str, label_column: str, config: Mapping[str, Any], max_images: int | None, progress: Progress, *,
        least: int,
    ) -> None:  # fmt: skip
        size, channels = config["image_size"], config["num_channels"]
        num_classes = config["num_labels"]
        key = json.dumps([data_identity(data), label_column, size, channels, max_images, 1])
        self._home = cache_folder() / "images" / hashlib.sha256(key.encode()).hexdigest()[:24]
        if not (self._home / "labels.npy").is_file():
            self._decode(data, label_column, size, channels, max_images, progress)
        self._labels = np.load(self._home / "labels.npy")
        shape = (len(self._labels), channels, size, size)
        self._pixels = np.memmap(self._home / "pixels.uint8", np.uint8, "r", shape=shape)
        if len(self) < least:
            raise InputError(f"the data '{data}' hold {len(self)} images, wanted at least {least}, one batch")
        if (worst := int(self._labels.max())) >= num_classes or int(self._labels.min()) < 0:
            raise InputError(f"the data '{data}' have the label {worst}, the model has {num_classes} classes")

    def _decode(
        self, data: str, label_column: str, size: int, channels: int, max_images: int | None, progress: Progress
    ) -> None:
        self._home.mkdir(parents=True, exist_ok=True)
        labels: list[int] = []
        writing = self._home / f"writing.{os.getpid()}"
        try:
            with writing.open("wb") as file:
                for row in _rows(data):
                    label = row.get(label_column)
                    if not isinstance(label, int):
                        columns = joined(row)
                        raise InputError(
                            f"the data '{data}' have no integer label column '{label_column}': they have {columns}; "
                            "name one with data.label_column"
                        )
                    file.write(_decoded(row, size, channels, data).tobytes())
                    labels.append(label)
                    progress("images", len(labels), max_images or 0)
                    if len(labels) == max_images:
                        break
            if not labels:
                raise InputError(f"the data '{data}' are empty")
            writing.replace(self._home / "pixels.uint8")
        finally:
            writing.unlink(missing_ok=True)
        partial = Path(f"{writing}.npy")
        np.save(partial, np.array(labels, np.int64))
        partial.replace(self._home / "labels.npy")

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        pixels = torch.from_numpy(self._pixels[index].astype(np.float32)) / 127.5 - 1
        return {"pixel_values": pixels, "labels": torch.tensor(self._labels[index]), "sequence": torch.tensor(index)}


def flipped(pixels: torch.Tensor, seed: int) -> torch.Tensor:
    """Return images of which a seed has mirrored about every second one."""
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(len(pixels), generator=generator) < 0.5).to(pixels.device)
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)
