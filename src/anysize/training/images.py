"""Images with labels: decoded once and kept on disk as bytes, handed out as the pixels that a model reads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from anysize.errors import InputError
from anysize.io.cache import MOVE_CACHE, cache_folder
from anysize.io.data_identity import data_identity
from anysize.io.image_processor import ImageProcessor
from anysize.io.pictures import label_of, picture
from anysize.io.rows import rows
from anysize.io.whole import told_of_disk
from anysize.progress import Progress

Example = dict[str, torch.Tensor]


class Images(Dataset[Example]):
    """Labelled images: {pixel_values: float32 [channels, size, size], labels: int64}, and their number.

    columns: of the image, "" for the first one that holds any, and of its class. The pixels are as `processor` prepares
    them, for a model of `num_classes` classes. Raises InputError where there are no images or labels, labels that the
    model does not have, or fewer than `least`.
    """

    def __init__(
        self, data: str, columns: tuple[str, str], num_classes: int, processor: ImageProcessor, max_images: int | None,
        progress: Progress, *, least: int, split: str = "train",
    ) -> None:  # fmt: skip
        self._processor = processor
        key = json.dumps([data_identity(data), split, columns, processor.settings_of_stored, max_images, 5])
        self._home = cache_folder() / "images" / hashlib.sha256(key.encode()).hexdigest()[:24]
        if not (self._home / "labels.npy").is_file():
            self._decode(data, split, columns, max_images, progress)
        self._labels = np.load(self._home / "labels.npy")
        shape = (len(self._labels), processor.num_channels, processor.image_size, processor.image_size)
        self._pixels = np.memmap(self._home / "pixels.uint8", np.uint8, "r", shape=shape)
        if len(self) < least:
            raise InputError(f"the data '{data}' hold {len(self)} images, wanted at least {least}, one step")
        least_label, most_label = int(self._labels.min()), int(self._labels.max())
        if least_label < 0 or most_label >= num_classes:
            raise InputError(
                f"the data '{data}' have the label {least_label if least_label < 0 else most_label}: wanted 0 to "
                f"{num_classes - 1}, the classes of the model"
            )

    def _decode(
        self, data: str, split: str, columns: tuple[str, str], max_images: int | None, progress: Progress
    ) -> None:
        column, label_column = columns
        labels: list[int] = []
        writing = self._home / f"writing.{os.getpid()}"
        with told_of_disk(f"cannot keep the images of '{data}' in '{self._home}'", MOVE_CACHE):
            self._home.mkdir(parents=True, exist_ok=True)
            partial = Path(f"{writing}.npy")
            try:
                with writing.open("wb") as file:
                    for row in rows(data, split=split, images=True):
                        labels.append(label_of(row, data, label_column, "data.label_column"))
                        file.write(self._processor.stored(picture(row, data, column), data).tobytes())
                        progress("images", len(labels), max_images or 0)
                        if len(labels) == max_images:
                            break
                if not labels:
                    raise InputError(f"the data '{data}' are empty")
                writing.replace(self._home / "pixels.uint8")
                np.save(partial, np.array(labels, np.int64))
                partial.replace(self._home / "labels.npy")
            finally:
                writing.unlink(missing_ok=True)
                partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        pixels = self._processor.pixels(self._pixels[index])
        return {"pixel_values": pixels, "labels": torch.tensor(self._labels[index]), "sequence": torch.tensor(index)}


def flipped(pixels: torch.Tensor, numbers: torch.Tensor, seed: int) -> torch.Tensor:
    """Return images of which about every second one is mirrored: which, a seed and an image's number alone decide.

    So a resumed run sees the same images, and so do several processes together. numbers: int64 [images].
    """
    mixed = (numbers + seed * 7_919) * 2_654_435_761 % (1 << 32)
    chosen = ((mixed >> 15) & 1).bool().to(pixels.device)
    return torch.where(chosen[:, None, None, None], pixels.flip(-1), pixels)
