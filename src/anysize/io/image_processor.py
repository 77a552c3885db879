"""How pixels are made of an image: what `preprocessor_config.json` asks for, as ViTImageProcessor does it.

With Pillow and numpy, bit for bit as transformers does it without torchvision.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from anysize.config import SourceConfig
from anysize.errors import CheckpointError, InputError, joined
from anysize.io.hub import local_folder

if TYPE_CHECKING:
    import torch
    from PIL import Image

_SETTINGS, _NESTED = "preprocessor_config.json", "processor_config.json"
# How many channels an image may have, and how it is decoded.
_MODES = {1: "L", 3: "RGB"}
# What is read, by Pillow's names: eight bits a channel or less, of which Pillow makes grey or RGB without clipping.
_READ = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
_KINDS = re.compile(r"(ViT|DeiT)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")
_COMMON = {
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "do_convert_rgb": False,
    "size": 224, "crop_size": None, "default_to_square": True, "resample": 2, "rescale_factor": 1 / 255,
    "image_mean": 0.5, "image_std": 0.5,
}  # fmt: skip
# What transformers' classes do where the file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": _COMMON,
    "DeiT": _COMMON | {"do_center_crop": True, "size": 256, "crop_size": 224, "resample": 3},
}
# Names, and how arrays are handed on: nothing of the pixels.
_SILENT = {
    "image_processor_type", "feature_extractor_type", "processor_class", "data_format", "input_data_format", "device",
    "return_tensors", "disable_grouping", "image_seq_length", "_valid_processor_keys", "pad_size",
}  # fmt: skip
# Where null is not the default but "no"; elsewhere it is refused.
_SWITCHES = {*(key for key in _COMMON if key.startswith("do_")), "default_to_square"}
_NUM_FILTERS = 6
# What `pixels` alone uses. These are named, not the others: a setting that is added later is safely part of any key.
_OF_PIXELS = {"rescale_factor", "mean", "std"}


@dataclass(frozen=True)
class ImageProcessor:
    """Makes pixels of images: resized, cropped at the center, rescaled and normalized, each where it is asked for.

    image_size, num_channels: of the model. size: (height, width) in pixels, or the shortest edge alone; None leaves
    images as they are. resample: Pillow's number of a filter, where images are resized. crop_size: (height, width).
    mean, std: one a channel, of rescaled values. place: where the settings were found, "" for nowhere.
    """

    image_size: int
    num_channels: int
    size: tuple[int, int] | int | None
    resample: int | None
    crop_size: tuple[int, int] | None
    rescale_factor: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    do_convert_rgb: bool = False
    place: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what pixels become, as JSON: it belongs into the key of whatever keeps them."""
        told = asdict(self)
        del told["place"]
        return json.loads(json.dumps(told))

    @property
    def settings_of_stored(self) -> dict[str, Any]:
        """Those of the settings that decide what `stored` gives: the key of bytes that are kept needs no others."""
        return {name: value for name, value in self.settings.items() if name not in _OF_PIXELS}

    @cached_property
    def levels(self) -> np.ndarray:
        """What each value of a byte becomes: float32 [channels, 256]."""
        # In the order and the precision of transformers, so that not even the last bit differs.
        found = np.tile(np.arange(256, dtype=np.float64), (self.num_channels, 1))
        if self.rescale_factor is not None:
            found *= self.rescale_factor
        found = found.astype(np.float32)
        if self.mean is None or self.std is None:
            return found
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return (found - mean) / std

    def stored(self, image: Image.Image, data: str) -> np.ndarray:
        """Return an image as uint8 [channels, size, size], resized and cropped; `pixels` makes the rest of it.

        Raises InputError where its values are not of 8 bits, and where it does not come out in the size that the model
        reads.
        """
        image = self._converted(image, data)
        if self.size is not None:
            height, width = self.size if isinstance(self.size, tuple) else _by_shortest(image, self.size)
            image = image.resize((width, height), self.resample)  # pyright: ignore[reportArgumentType]
        if self.crop_size is not None:
            height, width = self.crop_size
            # Where the image is smaller it is padded with zeros.
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))
        if image.size != (self.image_size, self.image_size):
            raise InputError(
                f"an image of the data '{data}' is {image.height}x{image.width} pixels after what '{self.place}' asks "
                f"for, and the model reads {self.image_size}x{self.image_size}: set do_resize and size in it"
            )
        found = np.asarray(image, np.uint8).reshape(self.image_size, self.image_size, self.num_channels)
        return np.ascontiguousarray(found.transpose(2, 0, 1))

    def pixels(self, stored: np.ndarray) -> torch.Tensor:
        """Return what the model reads, float32 [channels, size, size], of what `stored` gave."""
        import torch  # noqa: PLC0415

        return torch.from_numpy(np.stack([levels[values] for levels, values in zip(self.levels, stored, strict=True)]))

    def _converted(self, image: Image.Image, data: str) -> Image.Image:
        from PIL import Image as Pillow  # noqa: PLC0415

        if image.mode not in _READ:
            # Pillow clips what is above 255 to white, and transformers lets it; without do_convert_rgb it refuses.
            raise InputError(
                f"an image of the data '{data}' is of Pillow's mode {image.mode}, and {', '.join(_READ)} are read: "
                "scale its values to 0 to 255 and save it in 8 bits, as L or RGB"
            )
        if self.do_convert_rgb and ("A" in image.getbands() or image.info.get("transparency") is not None):
            image = image.convert("RGBA")
            image = Pillow.alpha_composite(Pillow.new("RGBA", image.size, (255, 255, 255, 255)), image)
        return image.convert(_MODES[self.num_channels])


def _by_shortest(image: Image.Image, size: int) -> tuple[int, int]:
    """Return (height, width) of an image whose shortest edge becomes `size`."""
    longest = int(size * max(image.size) / min(image.size))
    return (longest, size) if image.width <= image.height else (size, longest)


def image_processor_of(place: str, config: SourceConfig) -> ImageProcessor:
    """Return how a model's images are prepared: as the file beside it says, else as ViTImageProcessor does by default.

    `place` is a folder or a Hub id, or the name of a model in memory that came from neither. Raises InputError for
    settings that are not understood, each by its name, CheckpointError where the place is gone.
    """
    image_size, num_channels = config.full["image_size"], config.full["num_channels"]
    if num_channels not in _MODES:
        raise InputError(
            f"num_channels={num_channels}: images are read as grey (1) or as red, green and blue (3), so a model of "
            f"{num_channels} channels can read none"
        )
    found = _found(place) if is_place(place, config) else None
    if found is None:
        half = (0.5,) * num_channels
        return ImageProcessor(image_size, num_channels, (image_size, image_size), 2, None, 1 / 255, half, half)
    path, told = found
    return _Reading(path, told, num_channels).processor(image_size)


def is_place(place: str, config: SourceConfig) -> bool:
    """Whether a model came from somewhere; what did not is called by its class, or "None" by transformers."""
    return place not in ("", "None", config.model_class)


def identity_of(place: str, config: SourceConfig) -> str:
    """Return what changes when the settings beside an image model do; "" where there are none, and for text."""
    if config.architecture.modality != "image":
        return ""
    found = image_processor_of(place, config)
    return json.dumps(found.settings, sort_keys=True) if found.place else ""


def require_same_images(ours: ImageProcessor, theirs: ImageProcessor, who: str) -> None:
    """Raise InputError where two models that are shown the same pixels want them prepared in different ways.

    who: the two, for the sentence: "the teacher 'x' and the student".
    """
    one, other = ours.settings, theirs.settings
    if differ := [f"{name} is {one[name]} and {other[name]}" for name in one if one[name] != other[name]]:
        raise InputError(
            f"{who} want images prepared in different ways: {joined(differ)}; they would see different pixels, so give "
            f"both the same {_SETTINGS}"
        )


def _found(place: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the file of settings beside a model, and what is in it; None where there is none."""
    try:
        folder = local_folder(place, without_weights=True)
    except CheckpointError as error:
        raise CheckpointError(f"how images are prepared is said beside the model, and that is gone: {error}") from error
    nested = _json(folder / _NESTED)
    if nested is not None and isinstance(inner := nested.get("image_processor"), dict):
        # transformers prefers it as well.
        return folder / _NESTED, inner
    told = _json(folder / _SETTINGS)
    return None if told is None else (folder / _SETTINGS, told)


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read '{path}' as JSON: {error}") from error
    if not isinstance(told, dict):
        raise CheckpointError(f"'{path}' holds a {type(told).__name__}, wanted a JSON object")
    return told


class _Reading:
    """Reads settings, and notes whatever is not understood, so that all of it is named at once."""

    def __init__(self, path: Path, told: Mapping[str, Any], num_channels: int) -> None:
        self.path, self.num_channels = path, num_channels
        self.problems: list[str] = []
        name = told.get("image_processor_type") or told.get("feature_extractor_type") or "ViTImageProcessor"
        kind = _KINDS.fullmatch(name) if isinstance(name, str) else None
        if kind is None:
            self.problems.append(f"image_processor_type={name!r}: wanted ViTImageProcessor or DeiTImageProcessor")
        defaults = _DEFAULTS[kind[1] if kind else "ViT"]
        known = _SILENT | set(defaults)
        # What is switched off asks for nothing.
        unknown = [f"{k}={v!r}"[:80] for k, v in told.items() if k not in known and v is not None and v is not False]
        if unknown:
            self.problems.append(f"{', '.join(unknown)}: wanted {', '.join(defaults)}")
        self.given: dict[str, Any] = defaults | {
            k: False if v is None and k in _SWITCHES else v for k, v in told.items()
        }

    def processor(self, image_size: int) -> ImageProcessor:
        # Each value is read where its switch is on: elsewhere transformers does not look at it either.
        size = crop = resample = factor = mean = std = None
        if self._switch("do_resize"):
            size = self._size("size", square=self._switch("default_to_square"))
            resample = self._filter("resample")
        if self._switch("do_center_crop"):
            crop = self._height_and_width("crop_size")
        if self._switch("do_rescale"):
            factor = self._number("rescale_factor")
        if self._switch("do_normalize"):
            mean, std = self._per_channel("image_mean"), self._per_channel("image_std")
            if 0 in std:
                self.problems.append(f"image_std={self.given['image_std']!r}: wanted no zero, it is divided by")
        do_convert_rgb = self._switch("do_convert_rgb")
        if do_convert_rgb and self.num_channels != 3:
            self.problems.append(f"do_convert_rgb=true: the model reads {self.num_channels} channel")
        made = crop or size
        if isinstance(made, tuple) and made != (image_size, image_size) and not self.problems:
            self.problems.append(
                f"{'crop_size' if crop else 'size'}={self.given['crop_size' if crop else 'size']!r}: wanted "
                f"{image_size}x{image_size} pixels, which is what the model reads"
            )
        if self.problems:
            raise InputError(
                f"'{self.path}' says how images are prepared, and not all of it is understood: "
                f"{joined(self.problems)}; mend it, or take out what changes no pixel"
            )
        return ImageProcessor(
            image_size, self.num_channels, size, resample, crop, factor, mean, std, do_convert_rgb, str(self.path)
        )

    def _switch(self, key: str) -> bool:
        if not isinstance(self.given[key], bool):
            self.problems.append(f"{key}={self.given[key]!r}: wanted true or false")
        return bool(self.given[key])

    def _filter(self, key: str) -> int:
        value = self.given[key]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _NUM_FILTERS:
            self.problems.append(f"{key}={value!r}: wanted a number of Pillow's, 0 to {_NUM_FILTERS - 1}")
            return 0
        return value

    def _number(self, key: str) -> float:
        value = self.given[key]
        if not _is_number(value):
            self.problems.append(f"{key}={value!r}: wanted a number")
            return 1.0
        return float(value)

    def _per_channel(self, key: str) -> tuple[float, ...]:
        value = self.given[key]
        values = value if isinstance(value, list) else [value] * self.num_channels
        if len(values) != self.num_channels or not all(map(_is_number, values)):
            self.problems.append(f"{key}={value!r}: wanted a number, or {self.num_channels}, one a channel")
            return (1.0,) * self.num_channels
        return tuple(float(number) for number in values)

    def _size(self, key: str, *, square: bool) -> tuple[int, int] | int:
        value = self.given[key]
        edge = value.get("shortest_edge") if isinstance(value, dict) and len(value) == 1 else value
        if _is_count(edge) and (edge is not value or not square):
            return edge
        return self._height_and_width(key, " or a shortest_edge")

    def _height_and_width(self, key: str, other: str = "") -> tuple[int, int]:
        value, found = self.given[key], (0, 0)
        match value:
            case {"height": height, "width": width} if len(value) == 2:
                found = height, width
            case [height, width]:
                found = height, width
            case _:
                found = value, value
        if not all(map(_is_count, found)):
            self.problems.append(f"{key}={value!r}: wanted a height and a width{other}")
            return 1, 1
        return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
