"""Images and their classes in rows of data."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from anysize.errors import InputError, joined
from anysize.io.data_files import Row
from anysize.io.rows import is_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def picture(row: Row, data: str, column: str = "") -> Image:
    """Return a row's image, decoded and the right way up: that of a column, else the first.

    Raises InputError where the row holds none, or one that cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    if column and column not in row:
        raise InputError(f"the data '{data}' have no column '{column}': they have {joined(row)}")
    value = row[column] if column else next((v for v in row.values() if is_picture(v)), None)
    raw = value.get("bytes") if isinstance(value, dict) else value
    if raw is None or not is_picture(raw):
        raise InputError(f"the data '{data}' hold no images, and this model reads images: columns {joined(row)}")
    try:
        image = Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw
        image.load()
        # What comes decoded is turned already: `datasets` does it, and the same image in a file has to be the same.
        if isinstance(raw, bytes):
            image = _turned(image)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InputError(f"the data '{data}' hold an image that cannot be decoded: {error}") from error
    return image


def _turned(image: Image) -> Image:
    """Return an image as its camera was held, which EXIF data beside its pixels may say."""
    from PIL import ExifTags, ImageOps  # noqa: PLC0415

    try:
        told = ExifTags.Base.Orientation in image.getexif()
    except SyntaxError:
        # Pillow's way to say that it is no EXIF at all: what cannot be read asks for nothing.
        return image
    return ImageOps.exif_transpose(image) if told else image


def label_of(row: Row, data: str, column: str, option: str) -> int:
    """Return the class of a row's image; raise InputError where the row has none, naming the `option` that says where.

    Whether a model has such a class is not looked at.
    """
    if column not in row:
        if all(is_picture(value) for value in row.values()):
            raise InputError(
                f"the data '{data}' are images without labels, and labels are needed: give parquet or a Hub data set "
                f"with a column '{column}' of integers"
            )
        raise InputError(
            f"the data '{data}' have no column '{column}': they have {joined(row)}; name one with {option}"
        )
    label = row[column]
    if isinstance(label, bool) or not isinstance(label, int):
        raise InputError(f"the labels in '{column}' of '{data}' hold {label!r}: wanted integers")
    return label


def class_of(row: Row, data: str, column: str, option: str, *, num_classes: int, model: str) -> int:
    """Return the class of a row's image; raise InputError as `label_of` does, and for one that the model has not."""
    label = label_of(row, data, column, option)
    if not 0 <= label < num_classes:
        raise InputError(f"the label {label} in '{data}' is none of the {num_classes} that '{model}' has")
    return label
