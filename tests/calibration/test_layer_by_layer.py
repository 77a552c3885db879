"""Calibration with one layer in memory: the scores of the whole model, each layer read once, resumed after a kill."""

from __future__ import annotations

import errno
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import anysize
from anysize.calibration import calibrate
from anysize.calibration.calibrate import CalibrationOptions, calibrated
from anysize.calibration.data import Batch, DataOptions
from anysize.calibration.layer_by_layer import LayerByLayer
from anysize.calibration.on_disk import AveragesOnDisk
from anysize.calibration.scores import Scores
from anysize.calibration.share import Share
from anysize.calibration.sites import sites
from anysize.calibration.statistics import SiteSums
from anysize.config import understand
from anysize.errors import InputError, OutputError
from anysize.io import tensor_file
from anysize.io.models import quiet_transformers
from anysize.io.reader import Checkpoint
from anysize.progress import Progress, quiet
from tests import tiny
from tests.calibration.test_calibrate import same
from tests.calibration.test_resuming import Killed, killed_in, names_in

# The last batch is shorter than the others.
SHAPE = DataOptions(tokens=2048, sequence_length=64, batch_size=5)
LOW = CalibrationOptions(SHAPE, low_memory=True)
NUM_BATCHES, NUM_LAYERS = 7, 4
NAME = "scores.safetensors"
FOLDER = f".{NAME}.rank0.layers"
# Norms before branches, at their end, and on the stream; heads tied and not; experts; an image model.
FAMILIES = [
    "llama-GQA-tied", "gemma2-GQA-untied", "olmo2-MHA-tied", "opt-350m", "opt-projected", "gpt2-untied",
    "gpt_neox-untied", "mixtral-GQA-untied", "olmoe-MHA-tied", "qwen3_moe-MQA-tied", "vit-bias",
]  # fmt: skip


@pytest.fixture(scope="module")
def deep(new_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of more layers than two, so that what grows with them shows."""
    return new_llama(tmp_path_factory.mktemp("source") / "deep", num_hidden_layers=NUM_LAYERS)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tensor is read whole to be run."""
    found: Counter[str] = Counter()
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda source, name: (found.update([name]), read(source, name))[1])
    # What tells models apart reads small tensors as well.
    monkeypatch.setattr("anysize.calibration.share.model_sha256", lambda _tensors: "")
    return found


def pictures(folder: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for shade in range(0, 250, 50):
        path = folder / f"{shade}.png"
        Image.new("RGB", (12, 12), (shade, 0, 255 - shade)).save(path)
        rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}})
    datasets.Dataset.from_list(rows).to_parquet(folder / "images.parquet")
    return folder / "images.parquet"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_the_scores_of_the_whole_model(name: str, llama: Path, text: Path, tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == name)
    with quiet_transformers():
        tiny.model(variant, dtype=torch.float32).save_pretrained(tmp_path / "source")
    how: dict[str, Any] = {"tokens": 5, "batch_size": 2}
    data = text
    if variant.family == "vit":
        data = pictures(tmp_path)
    else:
        how = {"tokens": 600, "batch_size": 6, "sequence_length": 17, "tokenizer": str(llama)}
        data = tmp_path / "words.txt"
        data.write_text(" ".join(f"w{3 + (7 * i * i + i) % (tiny.VOCAB - 3)}" for i in range(1000)))
    whole = anysize.calibrate(tmp_path / "source", data, **how)
    low = anysize.calibrate(tmp_path / "source", data, low_memory=True, **how)
    assert low.record == whole.record
    assert list(low.record.feeds) == list(whole.record.feeds)
    assert {site: set(kinds) for site, kinds in low.sites.items()} == {s: set(k) for s, k in whole.sites.items()}
    assert all(low.of(site, kind).shape == low.sites[site].shape_of(kind) for site in low.sites  # pyright: ignore[reportAttributeAccessIssue]
               for kind in low.sites[site])  # fmt: skip
    assert same(low, whole, 1e-6)


def test_each_layer_is_read_once(deep: Path, text: Path, reads: Counter[str]) -> None:
    calibrated(Checkpoint(deep), str(text), LOW, progress=quiet)
    inside = {name for name in Checkpoint(deep).tensors if ".layers." in name}
    # Before the first layer, to learn what it reads, and after the last one, to see what the model ends with.
    around = {"model.embed_tokens.weight": 2, "model.norm.weight": 2}
    assert reads == dict.fromkeys(inside, 1) | around


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[SiteSums]:
    """The sums that are held."""
    found: weakref.WeakSet[SiteSums] = weakref.WeakSet()
    made = SiteSums.__init__

    def init(sums: SiteSums, size: int, *, second: bool) -> None:
        made(sums, size, second=second)
        found.add(sums)

    monkeypatch.setattr(SiteSums, "__init__", init)
    return found


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "layer by layer"])
def test_no_more_than_the_sums_of_one_layer_are_held(
    deep: Path, text: Path, alive: weakref.WeakSet[SiteSums], low_memory: bool
) -> None:
    most = 0

    def progress(_stage: str, _done: int, _total: int) -> None:
        nonlocal most
        most = max(most, len(alive))

    found = calibrated(Checkpoint(deep), str(text), replace(LOW, low_memory=low_memory), progress=progress)
    of_layer = {site.name for site in sites(understand(Checkpoint(deep).config)).values() if site.layer == 1}
    one = len(of_layer & found.sites.keys())
    assert one > 4
    assert most == one if low_memory else most > NUM_LAYERS * one
    assert all(isinstance(kinds, AveragesOnDisk) == low_memory for kinds in found.sites.values())


def test_one_layer_one_stream_and_one_batch_are_held(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[LayerByLayer] = []
    init = LayerByLayer.__init__

    def begun(run: LayerByLayer, *args: Any) -> None:
        init(run, *args)
        running.append(run)

    monkeypatch.setattr(LayerByLayer, "__init__", begun)
    streams: list[list[str]] = []

    def progress(_stage: str, done: int, _total: int) -> None:
        layers = running[0].layers
        # All batches are called alike, also the last one, which is shorter: what their calls need is there once.
        assert len({id(call) for call in layers.calls}) == 1
        assert not layers.stream
        parameters = dict(layers.model.named_parameters())
        there = {name.split(".")[2] for name, values in parameters.items() if values.device.type != "meta"}
        assert len(there) == (1 if done else 0)
        streams.append([path.name for path in sorted((tmp_path / FOLDER).glob("stream-*"))])

    calibrated(Checkpoint(deep), str(text), LOW, output=tmp_path / NAME, progress=progress)
    assert streams[0] == ["stream-0"]
    assert streams[-1] == [f"stream-{NUM_LAYERS - 1}", f"stream-{NUM_LAYERS}"]
    assert len(streams) == 1 + NUM_LAYERS * NUM_BATCHES


@pytest.mark.parametrize(
    ("stage", "call", "layers_done"),
    [("calibrate", 2 + 3, 0), ("calibrate", 2 + NUM_BATCHES, 1), ("calibrate", 2 + 2 * NUM_BATCHES + 3, 2),
     ("leave one out", 1, NUM_LAYERS)],
    ids=["in the first layer", "at the second layer", "in the third layer", "in what comes after"],
)  # fmt: skip
def test_a_killed_run_goes_on_with_the_layer_that_it_was_at(
    deep: Path, text: Path, tmp_path: Path, reads: Counter[str], stage: str, call: int, layers_done: int
) -> None:
    options = replace(LOW, leave_one_out=stage == "leave one out")

    def run(progress: Progress) -> Scores:
        return calibrated(Checkpoint(deep), str(text), options, output=tmp_path / NAME, progress=progress)

    whole = run(quiet)
    written = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).unlink()
    with pytest.raises(Killed):
        run(killed_in(stage, call))
    assert names_in(tmp_path) == [FOLDER]
    reads.clear()
    started_at: list[int] = []
    resumed = run(lambda _stage, done, _total: started_at.append(done))
    assert started_at[0] == SHAPE.tokens * layers_done // NUM_LAYERS
    read = {int(name.split(".")[2]) for name in reads if ".layers." in name}
    assert read == set(range(layers_done, NUM_LAYERS))
    assert resumed.record == whole.record
    assert same(resumed, whole)
    assert names_in(tmp_path) == [NAME]
    assert (tmp_path / NAME).read_bytes() == written


@pytest.mark.parametrize("what", ["damaged", "other options", "run as a whole"])
def test_what_is_no_work_of_this_kind_is_not_taken_up(deep: Path, text: Path, tmp_path: Path, what: str) -> None:
    def run(options: CalibrationOptions, progress: Progress) -> None:
        calibrated(Checkpoint(deep), str(text), options, output=tmp_path / NAME, progress=progress)

    with pytest.raises(Killed):
        run(LOW, killed_in("calibrate", 2 + NUM_BATCHES))
    if what == "damaged":
        (tmp_path / FOLDER / "sums-0.safetensors").write_bytes(b"not a file of ours")
    other = {"damaged": LOW, "other options": replace(LOW, second_moments=False),
             "run as a whole": CalibrationOptions(SHAPE)}[what]  # fmt: skip
    started_at: list[int] = []
    run(other, lambda _stage, done, _total: started_at.append(done))
    assert started_at[0] == 0
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize("begun", ["by this work", "by other work", "without a layer"])
def test_a_run_that_began_layer_by_layer_goes_on_so_when_memory_is_free_again(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    def run(progress: Progress, **how: Any) -> Scores:
        options = CalibrationOptions(SHAPE, **how)
        return calibrated(Checkpoint(deep), str(text), options, output=tmp_path / NAME, progress=progress)

    whole = run(quiet)
    with monkeypatch.context() as short:
        short.setattr("anysize.calibration.calibrate.fits_in_memory", lambda _: False)
        with pytest.raises(Killed):
            run(killed_in("calibrate", 2 if begun == "without a layer" else 2 + NUM_BATCHES + 2),
                second_moments=begun != "by other work")  # fmt: skip
    assert FOLDER in names_in(tmp_path)
    started_at: list[int] = []
    resumed = run(lambda _stage, done, _total: started_at.append(done))
    goes_on = begun == "by this work"
    assert started_at[0] == (SHAPE.tokens // NUM_LAYERS if goes_on else 0)
    assert all(isinstance(kinds, AveragesOnDisk) == goes_on for kinds in resumed.sites.values())
    assert same(resumed, whole, 1e-6)
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "layer by layer"])
def test_where_it_runs_is_decided_once(
    deep: Path, text: Path, monkeypatch: pytest.MonkeyPatch, low_memory: bool
) -> None:
    asked = 0

    def counted(*args: Any, **how: Any) -> Any:
        nonlocal asked
        asked += 1
        return decide(*args, **how)

    decide = calibrate.running_place
    monkeypatch.setattr(calibrate, "running_place", counted)
    options = replace(LOW, low_memory=low_memory, leave_one_out=True)
    calibrated(Checkpoint(deep), str(text), options, progress=quiet)
    assert asked == 1


def test_data_that_change_while_they_are_read_are_refused(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every, turns = Share.batches, 0

    def fewer(share: Share, done: int = 0) -> Iterator[Batch]:
        nonlocal turns
        turns += 1
        return every(share, done + turns - 1)

    monkeypatch.setattr(Share, "batches", fewer)
    with pytest.raises(InputError, match=r"the data '.*words\.txt' changed while they were read: calibrate again"):
        calibrated(Checkpoint(deep), str(text), LOW, output=tmp_path / NAME, progress=quiet)
    assert not names_in(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(deep: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot keep the sums of the calibration in '.*layers'"):
        calibrated(Checkpoint(deep), str(text), LOW, output=tmp_path / NAME, progress=quiet)


@pytest.mark.parametrize("change", ["missing", "short", "long"])
@pytest.mark.parametrize("name", ["ends", "stream-1"])
def test_a_layer_whose_stream_is_not_whole_is_not_taken_up(
    deep: Path, text: Path, tmp_path: Path, name: str, change: str
) -> None:
    def run(progress: Progress = quiet) -> Scores:
        return calibrated(Checkpoint(deep), str(text), LOW, output=tmp_path / NAME, progress=progress)

    whole = run()
    with pytest.raises(Killed):
        run(killed_in("calibrate", 2 + NUM_BATCHES + 2))
    file = tmp_path / FOLDER / name
    ends = SHAPE.tokens // SHAPE.sequence_length * understand(Checkpoint(deep).config).sizes["hidden"] * 4
    # The layer at work has begun to add to the ends.
    of_layers = ends * 2 if name == "ends" else ends * SHAPE.sequence_length
    assert file.stat().st_size >= of_layers
    if change == "missing":
        file.unlink()
    else:
        os.truncate(file, of_layers + {"short": -4, "long": 4}[change])
    started_at: list[int] = []
    resumed = run(lambda _stage, done, _total: started_at.append(done))
    assert (started_at[0] > 0) == (name == "ends" and change == "long")
    assert same(resumed, whole)
    assert names_in(tmp_path) == [NAME]


def test_a_layer_is_finished_only_once_what_it_left_outlasts_a_power_loss(
    deep: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replaced = os.fsync, Path.replace

    def synced(number: int) -> None:
        done.append(Path(f"/proc/self/fd/{number}").readlink().name)
        sync(number)

    def named(path: Path, target: Path) -> Path:
        done.append(f"named {target.stem}")
        return replaced(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    calibrated(Checkpoint(deep), str(text), LOW, progress=quiet)
    for layer in range(NUM_LAYERS):
        at = done.index(f"named sums-{layer}")
        assert done[at - 3 : at] == [f"stream-{layer + 1}", "ends", f".sums-{layer}.safetensors.writing"]


@pytest.mark.parametrize(
    ("file", "kept"),
    [("stream-0", []), ("stream-3", ["ends", "stream-2", "sums-0", "sums-1"]),
     ("sums-1", ["ends", "stream-1", "sums-0"]),
     (NAME, ["ends", "stream-4", "sums-0", "sums-1", "sums-2", "sums-3", "sums-around"])],
    ids=["before the first layer", "in the stream of a layer", "in the sums of a layer", "in the scores"],
)  # fmt: skip
def test_a_disk_that_fills_up_is_named_and_the_next_run_goes_on(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, kept: list[str]
) -> None:
    def run(progress: Progress = quiet) -> Scores:
        return calibrated(Checkpoint(deep), str(text), LOW, output=tmp_path / NAME, progress=progress)

    whole = run()
    (tmp_path / NAME).unlink()
    write, save = os.pwrite, tensor_file.save_one_by_one

    def full(number: int, data: Any, begin: int) -> int:
        if file in Path(f"/proc/self/fd/{number}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number, data, begin)

    def full_as_well(path: Path, *args: Any, **how: Any) -> None:
        if file in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *args, **how)

    with monkeypatch.context() as filled:
        filled.setattr(os, "pwrite", full)
        for module in ("layer_by_layer", "scores"):
            filled.setattr(f"anysize.calibration.{module}.save_one_by_one", full_as_well)
        with pytest.raises(OutputError, match=r"cannot (keep the sums|save the scores).*No space left on device"):
            run()
    assert names_in(tmp_path) == ([FOLDER] if kept else [])
    assert sorted(path.stem for path in (tmp_path / FOLDER).glob("*")) == kept
    started_at: list[int] = []
    resumed = run(lambda _stage, done, _total: started_at.append(done))
    layers_done = sum(name[5:].isdigit() for name in kept if name.startswith("sums-"))
    assert started_at[0] == SHAPE.tokens * layers_done // NUM_LAYERS
    assert same(resumed, whole)
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize("full", [False, True], ids=["room", "full"])
def test_what_processes_add_up_lies_in_the_folder_of_the_run(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    alone = calibrated(Checkpoint(deep), str(text), LOW, progress=quiet)

    # Two processes that found the same.
    def add_up(tensors: Iterable[torch.Tensor]) -> None:
        for values in tensors:
            values.mul_(2)

    write = os.pwrite

    def told(number: int, data: Any, begin: int) -> int:
        # A file without a name.
        if str(path := Path(f"/proc/self/fd/{number}").readlink()).endswith("(deleted)"):
            folders.append(path.parent)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(number, data, begin)

    folders: list[Path] = []
    monkeypatch.setattr(os, "pwrite", told)
    monkeypatch.setattr("anysize.calibration.layer_by_layer.add_up", add_up)
    folder = tmp_path / FOLDER
    share = Share(Checkpoint(deep), str(text), "", LOW)
    share.world = 2
    # All batches, as one process takes them.
    monkeypatch.setattr(share, "batches", share.everything)
    run = LayerByLayer(share, folder)
    if full:
        with pytest.raises(OutputError, match=rf"cannot keep the sums of the calibration in '{folder}': No space left"):
            run.run(quiet, stride=1)
    else:
        sums, layers, _ = run.run(quiet, stride=1)
        assert layers["count"][1] == 2 * (SHAPE.tokens // SHAPE.sequence_length)
        assert all(torch.equal(AveragesOnDisk(kinds)["mean"], alone.of(site, "mean")) for site, kinds in sums.items())
    assert set(folders) == {folder}
    # Its own sums are as they were.
    assert len(list(folder.glob("sums-*"))) == NUM_LAYERS + 1


@pytest.mark.parametrize("short", ["fits_in_memory", "free_bytes"])
def test_it_is_done_by_itself_where_memory_is_short(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: str
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24}
    usual = anysize.plan(deep, calibration=text, **sizes)
    assert usual.options.readers == "sequential"
    monkeypatch.setattr("anysize.calibration.calibrate.collect", lambda *_, **__: pytest.fail("it ran as a whole"))
    value = {"fits_in_memory": lambda _: False, "free_bytes": lambda: 100_000}[short]
    monkeypatch.setattr(f"anysize.calibration.calibrate.{short}", value)
    found = anysize.plan(deep, calibration=text, **sizes)
    assert found.to_json() == usual.to_json()
    assert found.dense == usual.dense
    calibrated(Checkpoint(deep), str(text), CalibrationOptions(SHAPE), output=tmp_path / NAME, progress=quiet)
    assert Scores.load(tmp_path / NAME).record.tokens == SHAPE.tokens


def test_the_file_is_written_with_each_matrix_read_once(
    deep: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = calibrated(Checkpoint(deep), str(text), LOW, progress=quiet)
    read: Counter[str] = Counter()
    get = AveragesOnDisk.__getitem__
    monkeypatch.setattr(
        AveragesOnDisk, "__getitem__", lambda kinds, kind: (read.update([f"{id(kinds)}/{kind}"]), get(kinds, kind))[1]
    )
    scores.save(tmp_path / NAME)
    assert len(read) == sum(map(len, scores.sites.values()))
    assert set(read.values()) == {1}
    assert same(Scores.load(tmp_path / NAME), scores, 1e-6)
