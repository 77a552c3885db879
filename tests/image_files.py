"""Image models on disk, images as files and tables, and what transformers itself makes of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pyarrow import Table, parquet

from anysize.config import SourceConfig, read_config, understand
from tests import tiny

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
DEIT = {"image_processor_type": "ViTImageProcessor", "size": {"height": 12, "width": 12}, **IMAGENET}


def variant() -> tiny.Variant:
    return next(v for v in tiny.VARIANTS if v.family == "vit")


def saved_vit(folder: Path, settings: dict[str, Any] | None = None, *, seed: int = 0) -> Path:
    """A tiny ViT as a checkpoint, with an image processor's settings beside it."""
    tiny.model(variant(), dtype=torch.float32, seed=seed).save_pretrained(folder)
    return prepared(folder, settings)


def prepared(folder: Path, settings: dict[str, Any] | None) -> Path:
    place = folder / "preprocessor_config.json"
    place.unlink(missing_ok=True)
    if settings is not None:
        place.write_text(json.dumps(settings), encoding="utf-8")
    return folder


def config_beside(folder: Path) -> SourceConfig:
    return understand(read_config(folder))


def drawn(number: int, height: int = 20, width: int = 26, mode: str = "RGB") -> Image.Image:
    """A random image of a number: smooth in parts, so that filters differ, and of every brightness."""
    generator = np.random.default_rng(number)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = generator.integers(0, 256, (height // 2, width // 2, channels), np.uint8)
    return Image.fromarray(pixels.squeeze(), mode).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def table(path: Path, count: int = 12, **columns: list[Any]) -> Path:
    """Images 0 to `count` as parquet with more columns."""
    shown = [{"bytes": png(drawn(number)), "path": None} for number in range(count)]
    parquet.write_table(Table.from_pydict({"image": shown, **columns}), path)
    return path


def by_transformers(folder: Path, *images: Image.Image) -> torch.Tensor:
    """What transformers' own image processor of a checkpoint makes of images, on Pillow."""
    from transformers import AutoImageProcessor

    processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return torch.stack([processor(image, return_tensors="pt")["pixel_values"][0] for image in images])
