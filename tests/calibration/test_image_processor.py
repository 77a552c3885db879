"""Images are prepared as the settings beside a checkpoint say, bit for bit as transformers prepares them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from anysize.errors import CheckpointError, InputError
from anysize.io.image_processor import image_processor_of
from tests.image_files import DEIT, IMAGENET, by_transformers, config_beside, drawn, prepared, saved_vit

SQUARE = {"size": {"height": 12, "width": 12}}
SETTINGS: dict[str, dict[str, Any]] = {
    "ImageNet": DEIT,
    "of old": {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 12},
    "nulls": {**DEIT, "image_processor_type": "DeiTImageProcessor", "do_center_crop": None, "image_mean": 0.3,
              "do_rescale": None},
    "cropped": {"feature_extractor_type": "DeiTFeatureExtractor", "size": 16, "crop_size": 12, "resample": 3,
                "do_center_crop": True, **IMAGENET},
    "DeiT by default": {"image_processor_type": "DeiTImageProcessor", "size": 15, "crop_size": 12},
    "padded": {**SQUARE, "size": {"height": 9, "width": 30}, "crop_size": [12, 12], "do_center_crop": True},
    "shortest edge": {"size": {"shortest_edge": 13}, "crop_size": {"height": 12, "width": 12}, "do_center_crop": True},
    "by shortest edge of old": {"size": 13, "default_to_square": False, "crop_size": 12, "do_center_crop": True},
    "not normalized": {**SQUARE, "do_normalize": False},
    "not rescaled": {**DEIT, "do_rescale": False},
    "another scale": {**DEIT, "rescale_factor": 0.0078125},
    "nearest": {**DEIT, "resample": 0},
    "Lanczos": {**DEIT, "resample": 1},
    "box": {**DEIT, "resample": 4},
    "one mean": {**SQUARE, "image_mean": 0.4, "image_std": 0.3},
    "fast": {**DEIT, "image_processor_type": "ViTImageProcessorFast"},
}  # fmt: skip


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_vit(tmp_path_factory.mktemp("vit"))


def ours(folder: Path, *images: Image.Image) -> torch.Tensor:
    processor = image_processor_of(str(folder), config_beside(folder))
    return torch.stack([processor.pixels(processor.stored(image, "data")) for image in images])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_pixels_are_those_of_transformers(vit: Path, settings: dict[str, Any]) -> None:
    images = drawn(0), drawn(1, 31, 14), drawn(2, 12, 12)
    wanted = by_transformers(prepared(vit, settings), *images).float()
    assert torch.equal(ours(vit, *images), wanted)
    # A mean that is a little off shows, where there is one.
    if settings.get("do_normalize") is not False:
        prepared(vit, {**settings, "image_mean": [0.5, 0.45, 0.41]})
        assert not torch.allclose(ours(vit, *images), wanted, atol=1e-3)


def test_without_settings_they_are_those_of_a_processor_by_default(vit: Path) -> None:
    images = drawn(0), drawn(2, 12, 12)
    alone = ours(prepared(vit, None), *images)
    assert torch.equal(alone, by_transformers(prepared(vit, SQUARE), *images))
    stored = torch.tensor(list(images[1].tobytes())).reshape(12, 12, 3).permute(2, 0, 1)
    assert torch.allclose(alone[1], stored / 127.5 - 1, atol=1e-6)


def test_settings_inside_a_processor_are_read_as_transformers_reads_them(vit: Path) -> None:
    prepared(vit, SQUARE)
    (vit / "processor_config.json").write_text(json.dumps({"image_processor": DEIT}), encoding="utf-8")
    try:
        assert torch.equal(ours(vit, drawn(0)), by_transformers(vit, drawn(0)))
        nested = ours(vit, drawn(0))
    finally:
        (vit / "processor_config.json").unlink()
    assert not torch.allclose(ours(vit, drawn(0)), nested, atol=1e-3)


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_other_images_become_red_green_and_blue_as_transformers_makes_them(vit: Path, mode: str) -> None:
    image = drawn(3, mode=mode)
    assert torch.equal(ours(prepared(vit, {**DEIT, "do_convert_rgb": True}), image), by_transformers(vit, image))


@pytest.mark.parametrize("do_convert_rgb", [True, False])
@pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB"])
def test_images_that_are_not_of_8_bits_are_refused(vit: Path, mode: str, do_convert_rgb: bool) -> None:
    prepared(vit, {**DEIT, "do_convert_rgb": do_convert_rgb})
    told = (
        f"an image of the data 'data' is of Pillow's mode {mode}, and 1, L, .* are read: scale its values to 0 to 255"
    )
    with pytest.raises(InputError, match=told):
        ours(vit, Image.new(mode, (12, 12)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"])
def test_images_of_8_bits_are_read(vit: Path, mode: str) -> None:
    # Pillow goes to these two by way of another.
    between = {"LA": "L", "PA": "P"}.get(mode, "RGB")
    image = drawn(3).convert(between).convert(mode)
    assert torch.equal(ours(prepared(vit, {**DEIT, "do_convert_rgb": True}), image), by_transformers(vit, image))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "image_processor_type='CLIPImageProcessor': wanted ViTImage"),
        ({"do_pad": True}, "do_pad=True: wanted do_resize, "),
        ({"crop_pct": 0.9}, "crop_pct=0.9: wanted"),
        ({"auto_map": {"AutoImageProcessor": "own.Own"}}, "auto_map="),
        ({"size": {"longest_edge": 12}}, "size={'longest_edge': 12}: wanted a height and a width or a shortest_edge"),
        ({"size": {"height": 16, "width": 16}}, "wanted 12x12 pixels, which is what the model reads"),
        ({"size": None}, "size=None: wanted a height and a width or a shortest_edge"),
        ({"size": 224}, "size=224: wanted 12x12 pixels"),
        ({"image_mean": None}, "image_mean=None: wanted a number"),
        ({"do_center_crop": True}, "crop_size=None: wanted a height and a width"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 12}}, "crop_size=.*: wanted a height and a width"),
        ({"resample": 7}, "resample=7: wanted a number of Pillow's, 0 to 5"),
        ({"resample": None}, "resample=None: wanted"),
        ({"resample": "bicubic"}, "resample='bicubic'"),
        ({"image_mean": [0.5]}, "image_mean=.*: wanted a number, or 3, one a channel"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std=.*: wanted no zero"),
        ({"rescale_factor": "1/255"}, "rescale_factor='1/255': wanted a number"),
        ({"do_normalize": "yes"}, "do_normalize='yes': wanted true or false"),
    ],
    ids=str,
)
def test_settings_that_are_not_understood_are_refused_by_name(vit: Path, settings: dict[str, Any], told: str) -> None:
    prepared(vit, DEIT)
    assert image_processor_of(str(vit), config_beside(vit))
    prepared(vit, {**DEIT, **settings})
    with pytest.raises(InputError, match=f"preprocessor_config.json' says how images are prepared.*{told}") as raised:
        image_processor_of(str(vit), config_beside(vit))
    assert "\n" not in str(raised.value)


def test_what_changes_no_pixel_is_not_refused(vit: Path) -> None:
    prepared(vit, {**DEIT, "do_pad": False, "crop_pct": None, "processor_class": "X", "data_format": "channels_first"})
    assert torch.equal(ours(vit, drawn(0)), by_transformers(prepared(vit, DEIT), drawn(0)))


@pytest.mark.parametrize(
    "settings",
    [
        {"do_normalize": False, "image_mean": None, "image_std": [0.5]},
        {"do_normalize": None, "image_std": 0},
        {"do_rescale": False, "rescale_factor": None},
        {"do_resize": False, "size": None, "resample": None, "default_to_square": 1},
        {"do_center_crop": False, "crop_size": "none"},
    ],
    ids=str,
)
def test_what_is_switched_off_is_not_looked_at(vit: Path, settings: dict[str, Any]) -> None:
    off = {key: value for key, value in settings.items() if key.startswith("do_")}
    image = drawn(0, 12, 12)
    wanted = by_transformers(prepared(vit, {**DEIT, **off}), image).float()
    assert torch.equal(ours(prepared(vit, {**DEIT, **settings}), image), wanted)


def test_images_that_come_out_in_another_size_are_refused(vit: Path) -> None:
    prepared(vit, {**DEIT, "do_resize": False})
    assert torch.equal(ours(vit, drawn(0, 12, 12)), by_transformers(vit, drawn(0, 12, 12)))
    with pytest.raises(InputError, match=r"an image of the data 'data' is 20x26 pixels after .* the model reads 12x12"):
        ours(vit, drawn(0))


@pytest.mark.parametrize(("content", "told"), [("{", "as JSON"), ("[]", "holds a list, wanted a JSON object")])
def test_a_damaged_file_of_settings_is_refused(vit: Path, content: str, told: str) -> None:
    (vit / "preprocessor_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=told):
        image_processor_of(str(vit), config_beside(vit))
    prepared(vit, None)


def test_a_place_that_is_gone_is_refused(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="how images are prepared is said beside the model, and that is gone"):
        image_processor_of(str(tmp_path / "nowhere"), config_beside(vit))
