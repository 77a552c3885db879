"""Images of a model with settings of its own, wherever they are read; their labels; and folders of image files."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from pyarrow import Table, parquet
from safetensors.torch import load_file, save_file

import anysize
from anysize.calibration import calibrate
from anysize.calibration.calibrate import CalibrationOptions
from anysize.calibration.data import DataOptions, batches, batches_again, labelled_batches
from anysize.calibration.leave_one_out import require_loss
from anysize.calibration.scores import Scores
from anysize.errors import InputError
from anysize.io.image_processor import ImageProcessor, image_processor_of
from anysize.io.pictures import picture
from anysize.io.reader import Checkpoint
from anysize.io.rows import rows
from anysize.progress import Progress, quiet
from anysize.proof.parity import load
from anysize.training.config import TrainConfig
from anysize.training.images import Images
from anysize.training.run import train
from tests.calibration.test_resuming import Killed, killed_in
from tests.image_files import DEIT, by_transformers, config_beside, drawn, prepared, saved_vit, table

LABELS = [0, 3, 6, 1, 2, 2, 5, 4, 0, 1, 6, 3]


def calibrated(model: Path, data: Path, **options: Any) -> Any:
    return anysize.calibrate(model, data, tokens=12, batch_size=4, **options)


def shown(folder: Path, data: Path, **columns: str) -> tuple[torch.Tensor, list[int]]:
    """All images of the data as transformers prepares them, and their labels, in the order in which they are read."""
    read = list(rows(str(data), images=True))
    images = [Image.open(io.BytesIO(row["image"]["bytes"])) for row in read]
    return by_transformers(folder, *images), [row.get(columns.get("label", "label"), -1) for row in read]


@pytest.fixture
def deit(tmp_path: Path) -> Path:
    return saved_vit(tmp_path / "deit", DEIT)


def test_a_model_is_calibrated_on_images_as_it_reads_them(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    seen: list[torch.Tensor] = []
    model = load(deit, "ViTForImageClassification")
    hook = model.get_submodule("vit.embeddings.patch_embeddings.projection").register_forward_hook(
        lambda _m, _a, out: seen.append(out.flatten(2).transpose(1, 2).flatten(0, 1))
    )
    with torch.no_grad():
        model(shown(deit, data)[0])
    hook.remove()
    found = calibrated(deit, data).of("vit.embeddings.patch_embeddings.projection:out", "abs")
    wanted = seen[0].abs().double().mean(0)
    assert torch.allclose(found, wanted, rtol=1e-5)
    other = calibrated(prepared(deit, None), data).of("vit.embeddings.patch_embeddings.projection:out", "abs")
    assert not torch.allclose(other, wanted, rtol=1e-2)


# At how many of the ten places each of them writes.
WRITTEN_AS = {"vit.embeddings.cls_token": 1, "vit.embeddings.position_embeddings": 10}


def test_what_the_class_token_and_the_positions_write_is_kept(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet")
    weights = load_file(deit / "model.safetensors")
    for name, values in weights.items():
        if "projection" in name or "output.dense" in name:
            values[4:6] *= 0.01
    for coordinate, name in enumerate(WRITTEN_AS, 4):
        weights[name][..., 4:6] = 0
        weights[name][..., coordinate] = 100
    save_file(weights, deit / "model.safetensors", {"format": "pt"})
    for select in ("activation", "rms"):
        asked: dict[str, Any] = {"select": select, "readers": "none", "hidden_size": 16}
        plan = anysize.plan(deit, calibration=calibrated(deit, data), **asked)
        assert {4, 5} <= set(plan.axes["hidden"].index.tolist())


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("how", ["at once", "after a kill", "two processes"])
def test_the_class_token_and_the_positions_count_at_each_of_their_places(
    deit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, low_memory: bool
) -> None:
    data, output = table(tmp_path / "images.parquet"), tmp_path / "scores.safetensors"

    def run(progress: Progress = quiet) -> None:
        options = CalibrationOptions(DataOptions(tokens=12, batch_size=5), low_memory=low_memory)
        calibrate.calibrated(Checkpoint(deit), str(data), options, output=output, progress=progress)

    if how == "two processes":
        script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
        asked = ["calibrate", deit, data, "-o", output, "--tokens", 12, "--batch-size", 5]
        command = [*script, Path(sys.executable).with_name("anysize"), *asked, *["--low-memory"] * low_memory]
        subprocess.run([str(part) for part in command], capture_output=True, check=True, timeout=300)
    else:
        monkeypatch.setattr(calibrate, "_SAVE_EVERY_S", 0.0)
        monkeypatch.setattr(calibrate, "_SAVING_SHARE", float("inf"))
        if how == "after a kill":
            with pytest.raises(Killed):
                run(killed_in("calibrate", 5 if low_memory else 3))
        run()
    found = Scores.load(output)
    for name, count in WRITTEN_AS.items():
        values = Checkpoint(deit).read(name)[0].double()
        assert len(values) == count
        assert found.of(f"{name}:out", "abs").allclose(values.abs().sum(0) / 10, rtol=1e-5)
        assert found.of(f"{name}:out", "rms").allclose((values.square().sum(0) / 10).sqrt(), rtol=1e-5)


def test_scores_are_not_gone_on_with_once_images_are_prepared_in_another_way(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet")
    found = calibrated(deit, data)
    tensors, config = Checkpoint(deit), config_beside(deit)
    again = torch.cat([b["pixel_values"] for b in batches_again(found.record, config, tensors, limit=12)])
    assert torch.equal(again, shown(deit, data)[0])
    asked: dict[str, Any] = {"num_hidden_layers": 1, "layers": "evolutionary", "calibration": found}
    assert anysize.plan(deit, **asked).layers
    prepared(deit, None)
    with pytest.raises(InputError, match=r"prepared as images are beside '.*deit', are not those that the scores were"):
        anysize.plan(deit, **asked)


def test_training_hands_out_what_the_model_reads_and_keeps_each_way_apart(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)

    def made() -> torch.Tensor:
        processor = image_processor_of(str(deit), config_beside(deit))
        images = Images(str(data), ("", "label"), 7, processor, None, quiet, least=1)
        return torch.stack([images[i]["pixel_values"] for i in range(len(images))])

    assert torch.equal(made(), shown(deit, data)[0])
    prepared(deit, {**DEIT, "size": 24, "crop_size": 12, "do_center_crop": True})
    assert torch.equal(made(), shown(deit, data)[0])
    prepared(deit, DEIT)
    assert torch.equal(made(), shown(deit, data)[0])


def test_images_are_decoded_once_for_all_ways_to_scale_them(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    decoded: list[int] = []

    def made(**settings: Any) -> int:
        prepared(deit, {**DEIT, **settings})
        processor = image_processor_of(str(deit), config_beside(deit))
        decoded.clear()
        images = Images(str(data), ("", "label"), 7, processor, None, lambda *_: decoded.append(1), least=1)
        assert torch.equal(torch.stack([image["pixel_values"] for image in images]), shown(deit, data)[0])
        return len(decoded)

    assert made() == len(LABELS)
    assert made() == made(image_mean=0.4, image_std=0.3) == made(rescale_factor=0.01) == made(do_rescale=False) == 0
    assert made(do_normalize=False) == 0
    for changed in ({"resample": 3}, {"size": 24, "do_center_crop": True, "crop_size": 12}, {"do_convert_rgb": True}):
        assert made(**changed) == len(LABELS)


def test_a_model_is_evaluated_on_images_as_it_reads_them(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    pixels, labels = shown(deit, data)
    with torch.no_grad():
        logits = load(deit, "ViTForImageClassification")(pixels).logits
    wanted = float(torch.nn.functional.cross_entropy(logits, torch.tensor(labels)))
    found = anysize.evaluate(deit, data).images
    assert found is not None
    assert found.loss_nats_per_image == pytest.approx(wanted, rel=1e-5)
    # In memory it came from nowhere, and reads what its source reads.
    made = anysize.resize(deit, intermediate_size=40)
    beside = anysize.evaluate(made, data, source=deit).images
    assert beside is not None
    assert beside.source is not None
    assert beside.source.loss_nats_per_image == pytest.approx(wanted, rel=1e-5)
    assert beside.loss_nats_per_image == pytest.approx(wanted, rel=1e-3)
    other = saved_vit(tmp_path / "vit")
    with pytest.raises(InputError, match=r"want images prepared in different ways: .*mean is \[0.5.*\] and \[0.485"):
        anysize.evaluate(other, data, source=deit)
    alone = anysize.evaluate(other, data).images
    assert alone is not None
    assert alone.loss_nats_per_image != pytest.approx(wanted, rel=1e-3)


def run_config(model: Path, data: Path, output: Path, **more: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "model": str(model), "output": str(output), "data": {"train": str(data), "flip": False},
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "learning_rate": 1e-4}, **more,
    })  # fmt: skip


def test_a_run_knows_how_its_images_are_prepared(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    config = run_config(deit, data, tmp_path / "run")
    done = train(config, command="", origin="", progress=quiet)
    assert (tmp_path / "run" / "preprocessor_config.json").read_bytes() == (
        deit / "preprocessor_config.json"
    ).read_bytes()
    assert train(config, command="", origin="", progress=quiet) == done
    for settings in ({**DEIT, "image_mean": [0.4, 0.5, 0.5]}, None):
        prepared(deit, settings)
        with pytest.raises(InputError, match=r"made of other files \(image processor of model changed since\)"):
            train(config, command="", origin="", progress=quiet)


def test_a_teacher_that_reads_other_pixels_is_refused(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    teacher = saved_vit(tmp_path / "vit", seed=1)
    config = run_config(deit, data, tmp_path / "run", distill={"teacher": str(teacher), "weight": 0.5})
    with pytest.raises(InputError, match=r"the student and the teacher '.*vit' want images prepared in different ways"):
        train(config, command="", origin="", progress=quiet)
    prepared(teacher, DEIT)
    assert train(config, command="", origin="", progress=quiet)["finished"]


@pytest.mark.parametrize("column", ["label", "kind"])
def test_the_loss_without_each_layer_is_that_of_the_labels(deit: Path, tmp_path: Path, column: str) -> None:
    data = table(tmp_path / "images.parquet", **{column: LABELS})
    # The last batch holds two of the 12, and each image counts alike.
    scores = anysize.calibrate(deit, data, tokens=12, batch_size=5, leave_one_out=True, label_column=column)
    found = scores.block("leave-one-out")

    from transformers import ViTForImageClassification

    pixels, labels = shown(deit, data, label=column)
    losses: list[float] = []
    for kept in ([0, 1], [1], [0]):
        model: Any = ViTForImageClassification.from_pretrained(deit)
        layers = model.get_submodule("vit").encoder.layer if hasattr(model.vit, "encoder") else model.vit.layers
        for gone in sorted({0, 1} - set(kept)):
            layers[gone].forward = lambda hidden, *_, **__: hidden
        with torch.no_grad():
            losses.append(float(torch.nn.functional.cross_entropy(model(pixels).logits, torch.tensor(labels))))
    assert found.tolist() == pytest.approx([losses[1] - losses[0], losses[2] - losses[0]], abs=1e-5)
    assert found[0] != pytest.approx(float(found[1]), abs=1e-3)


def test_layers_are_left_out_by_labels_on_the_fly(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    asked: dict[str, Any] = {"num_hidden_layers": 1, "layers": "leave-one-out"}
    kept = [step.source for step in anysize.plan(deit, calibration=data, **asked).layers]
    scores = anysize.calibrate(deit, data, leave_one_out=True)
    assert kept == [step.source for step in anysize.plan(deit, calibration=scores, **asked).layers]
    assert kept == [int(scores.block("leave-one-out").argmax())]


@pytest.mark.parametrize(
    ("columns", "options", "told"),
    [
        ({}, {}, "are images without labels, and labels are needed: give parquet or a Hub data set"),
        ({"kind": LABELS}, {}, "have no column 'label': they have image; kind; name one with --label-column"),
        ({"label": ["a"] * 12}, {}, "the labels in 'label' of '.*' hold 'a': wanted integers"),
        ({"label": [7] * 12}, {}, "the label 7 in '.*' is none of the 7"),
        ({"kind": LABELS}, {"label_column": "kind", "leave_one_out": False}, "label_column='kind' would do nothing"),
    ],
)
def test_labels_that_are_not_there_are_named(
    deit: Path, tmp_path: Path, columns: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    data = table(tmp_path / "images.parquet", **columns)
    with pytest.raises(InputError, match=told):
        calibrated(deit, data, **{"leave_one_out": True, **options})


def test_labels_are_looked_at_without_the_pixels(deit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, options = config_beside(deit), DataOptions(tokens=12, batch_size=4)
    monkeypatch.setattr(ImageProcessor, "stored", lambda *_: pytest.fail("pixels were made"))
    require_loss(config, str(table(tmp_path / "good.parquet", label=LABELS)), str(deit), options)
    late = table(tmp_path / "late.parquet", label=[0] * 11 + [7])
    with pytest.raises(InputError, match=r"the label 7 in '.*' is none of the 7"):
        require_loss(config, str(late), str(deit), options)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_a_tokenizer_for_images_is_refused_before_anything_is_read(
    deit: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave_one_out: bool
) -> None:
    monkeypatch.setattr("anysize.calibration.calibrate.loaded_source", lambda *_, **__: pytest.fail("it was loaded"))
    data = table(tmp_path / "images.parquet")
    with pytest.raises(InputError, match=f"the tokenizer '{llama}' would do nothing: '{deit}' reads images"):
        calibrated(deit, data, leave_one_out=leave_one_out, tokenizer=str(llama))


def test_text_has_no_labels(llama: Path, text: Path) -> None:
    with pytest.raises(InputError, match="label_column='kind' would do nothing: labels are read of images"):
        anysize.calibrate(llama, text, leave_one_out=True, label_column="kind")


def test_batches_with_labels_are_those_without(deit: Path, tmp_path: Path) -> None:
    data = str(table(tmp_path / "images.parquet", label=LABELS))
    options = DataOptions(tokens=10, batch_size=4)
    plain = list(batches(data, config_beside(deit), str(deit), options))
    told = list(labelled_batches(data, config_beside(deit), str(deit), options))
    assert [len(batch["labels"]) for batch in told] == [4, 4, 2]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(plain, told, strict=True))
    assert torch.cat([batch["labels"] for batch in told]).tolist() == shown(deit, Path(data))[1][:10]


def image_folder(folder: Path, count: int = 60) -> Path:
    """Image files that lie class by class, and text beside them."""
    for number in range(count):
        place = folder / f"class{number // 10}" / f"{number:03}{'.png' if number % 2 else '.PNG'}"
        place.parent.mkdir(parents=True, exist_ok=True)
        drawn(number).save(place)
    (folder / "README.md").write_text("about them", encoding="utf-8")
    return folder


def test_a_folder_of_image_files_is_read_from_all_over_it(deit: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "files")
    found = [row["image"]["path"] for row in rows(str(folder), images=True)]
    assert sorted(number[:3] for number in found) == [f"{number:03}" for number in range(60)]
    assert found == [row["image"]["path"] for row in rows(str(folder), images=True)]
    assert len({number[:2] for number in found[:20]}) == 6, "20 images in, some classes have not been read"
    scores = calibrated(deit, folder)
    assert scores.record.tokens == 12
    # As the same images are, in the same order, from a table.
    first = [int(number[:3]) for number in found[:12]]
    read = next(batches(str(folder), config_beside(deit), str(deit), DataOptions(tokens=12, batch_size=12)))
    assert torch.equal(read["pixel_values"], by_transformers(deit, *(drawn(number) for number in first)))
    one = next(batches(str(folder / "class0" / "001.png"), config_beside(deit), str(deit), DataOptions(tokens=12)))
    assert torch.equal(one["pixel_values"], by_transformers(deit, drawn(1)))


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 7])
def test_images_are_turned_the_right_way_up_as_a_hub_data_set_turns_them(
    tmp_path: Path, orientation: int | None
) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    file = tmp_path / "a.png"
    drawn(0).save(file, exif=exif)
    stored = {"bytes": file.read_bytes(), "path": None}
    parquet.write_table(Table.from_pydict({"image": [stored]}), tmp_path / "a.parquet")
    wanted = datasets.Image().decode_example(stored)
    assert (wanted.size == drawn(0).size) == (orientation not in (6, 7))
    decoded = picture({"image": wanted}, "Hub")
    for found in (decoded, *(picture(next(rows(str(p), images=True)), "") for p in (file, tmp_path / "a.parquet"))):
        assert found.size == wanted.size
        assert found.tobytes() == wanted.tobytes()


def test_an_image_with_damaged_exif_is_read_as_it_is() -> None:
    file = io.BytesIO()
    drawn(0).save(file, "PNG", exif=b"no such thing")
    assert picture({"image": file.getvalue()}, "").tobytes() == drawn(0).tobytes()


def test_image_files_have_no_labels(deit: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "files", 12)
    told = "are images without labels, and labels are needed: give parquet or a Hub data set with a column 'label'"
    with pytest.raises(InputError, match=told):
        anysize.evaluate(deit, folder)
    with pytest.raises(InputError, match=told):
        calibrated(deit, folder, leave_one_out=True)
    with pytest.raises(InputError, match=told):
        train(run_config(deit, folder, tmp_path / "run"), command="", origin="", progress=quiet)


def test_folders_without_images_or_with_two_kinds_of_them_are_refused(deit: Path, llama: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "files", 2)
    with pytest.raises(InputError, match=r"holds no \.txt, .*\.tsv file"):
        anysize.calibrate(llama, folder / "class0")
    table(folder / "more.parquet")
    with pytest.raises(InputError, match=r"holds image files and the table 'more\.parquet'"):
        calibrated(deit, folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("words", encoding="utf-8")
    with pytest.raises(InputError, match=r"'.*empty' holds no \.png, \.jpg, .*\.parquet, "):
        calibrated(deit, tmp_path / "empty")
    with pytest.raises(InputError, match=r"the data '.*nothing\.png' do not exist"):
        calibrated(deit, tmp_path / "nothing.png")
    np.save(tmp_path / "a.npy", np.zeros(1))
    with pytest.raises(InputError, match="is none of"):
        calibrated(deit, tmp_path / "a.npy")


def comparison(source: Path, data: Path, output: Path, **arm: Any) -> Any:
    from anysize.comparison.compare import compare
    from anysize.comparison.config import compare_config

    config = compare_config({
        "output": str(output), "source": str(source), "target": {"num_hidden_layers": 1}, "evaluations": 1,
        "data": dict.fromkeys(("train", "validation", "test"), str(data)), "seeds": [0], "learning_rates": [1e-3],
        "calibration": {"batch_size": 4}, "training": {"max_steps": 2, "per_device_train_batch_size": 4},
        "arms": {"random": {"random": True}, "loss": {"preset": "subcloning", "layers": "leave-one-out", **arm}},
    }, "c.yaml")  # fmt: skip
    return compare(config, text="", command="", progress=quiet)


@pytest.mark.usefixtures("in_this_process")
def test_a_comparison_prepares_images_as_its_source_does(deit: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "images.parquet", label=LABELS)
    with pytest.raises(InputError, match=r"'.*vit' of arm 'loss' want images prepared in different ways"):
        comparison(deit, data, tmp_path / "out", distill={"teacher": str(saved_vit(tmp_path / "vit"))})
    assert [run.status for run in comparison(deit, data, tmp_path / "out").runs if run.arm == "loss"]
    prepared(deit, None)
    with pytest.raises(InputError, match="holds another comparison"):
        comparison(deit, data, tmp_path / "out")
