"""What a calibration keeps while it runs: taken up after a kill, by the same work only, and removed by a refusal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from anysize.calibration.calibrate import CalibrationOptions, calibrated
from anysize.calibration.data import DataOptions
from anysize.calibration.scores import Scores
from anysize.errors import InputError, OutputError
from anysize.io.reader import Checkpoint
from anysize.progress import Progress, quiet
from tests.calibration.test_calibrate import same

SHAPE = DataOptions(sequence_length=64, batch_size=4)
NUM_BATCHES = 24
NAME = "scores.safetensors"
PARTIAL = f".{NAME}.rank0.partial"
LOCK = f".{NAME}.rank0.lock"


class Killed(BaseException):
    """As abrupt as a signal."""


@pytest.fixture(autouse=True)
def always_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are kept after every batch."""
    monkeypatch.setattr("anysize.calibration.calibrate._SAVE_EVERY_S", 0.0)
    monkeypatch.setattr("anysize.calibration.calibrate._SAVING_SHARE", float("inf"))


def killed_in(stage: str, call: int) -> Progress:
    """Progress that ends at the n-th report of a stage; the first is made before any work."""
    calls = 0

    def progress(name: str, _done: int, _total: int) -> None:
        nonlocal calls
        calls += name == stage
        if calls == call:
            raise Killed

    return progress


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("stage", "call", "batches_done"),
    [
        ("calibrate", 4, 3),
        ("calibrate", NUM_BATCHES + 1, NUM_BATCHES),
        ("leave one out", 1, NUM_BATCHES),
    ],
    ids=["on the way", "after the last batch", "in what comes after"],
)
def test_a_killed_calibration_goes_on_where_it_was(
    llama: Path, text: Path, tmp_path: Path, stage: str, call: int, batches_done: int
) -> None:
    options = CalibrationOptions(SHAPE, leave_one_out=stage == "leave one out")
    output = tmp_path / NAME

    def run(progress: Progress) -> Scores:
        return calibrated(Checkpoint(llama), str(text), options, output=output, progress=progress)

    whole = run(quiet)
    assert names_in(tmp_path) == [NAME]
    output.unlink()
    with pytest.raises(Killed):
        run(killed_in(stage, call))
    assert names_in(tmp_path) == [PARTIAL]
    started_at: list[int] = []
    resumed = run(lambda _stage, done, _total: started_at.append(done))
    assert started_at[0] == min(batches_done * 4 * 64, whole.record.tokens)
    assert resumed.record == whole.record
    assert same(resumed, whole, 1e-12)
    assert names_in(tmp_path) == [NAME]


def test_what_more_processes_kept_is_removed_once_fewer_are_done(llama: Path, text: Path, tmp_path: Path) -> None:
    others = {f".other-{NAME}.rank1.partial", f".{NAME}.rank.layers", f".{NAME}.rank1.copy"}
    for name in (PARTIAL, f".{NAME}.rank2.partial", f".{NAME}.rank3.partial.writing", f".{NAME}.rank4.lock", *others):
        (tmp_path / name).write_bytes(b"sums")
    for rank in (1, 12):
        (tmp_path / f".{NAME}.rank{rank}.layers").mkdir()
        (tmp_path / f".{NAME}.rank{rank}.layers" / "ends").write_bytes(b"ends")
    calibrated(Checkpoint(llama), str(text), CalibrationOptions(SHAPE), output=tmp_path / NAME, progress=quiet)
    assert names_in(tmp_path) == sorted({NAME, *others})


@pytest.mark.parametrize("low_memory", [False, True], ids=["whole", "layer by layer"])
def test_a_second_calibration_to_the_same_output_is_refused_and_disturbs_nothing(
    llama: Path, text: Path, tmp_path: Path, low_memory: bool
) -> None:
    calls = 0

    def run(progress: Progress, name: str = NAME) -> Scores:
        options = CalibrationOptions(SHAPE, low_memory=low_memory)
        return calibrated(Checkpoint(llama), str(text), options, output=tmp_path / name, progress=progress)

    def second(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == NUM_BATCHES:
            before = names_in(tmp_path)
            with pytest.raises(OutputError, match=rf"another process is at work on '.*{NAME}': wait for it, or choose"):
                run(quiet)
            assert names_in(tmp_path) == before
            run(quiet, "other.safetensors")

    found = run(second)
    assert calls > NUM_BATCHES
    assert names_in(tmp_path) == ["other.safetensors", NAME]
    assert same(found, Scores.load(tmp_path / "other.safetensors"), 1e-6)


def test_what_is_no_work_of_ours_is_not_taken_up(llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / PARTIAL).write_bytes(b"not a file of ours")
    found = calibrated(
        Checkpoint(llama), str(text), CalibrationOptions(SHAPE), output=tmp_path / NAME, progress=quiet
    )  # fmt: skip
    assert found.record.tokens > 5000
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize("what", ["data", "tokenizer", "the rest of the data", "the format of scores"])
def test_work_on_data_or_a_tokenizer_that_have_changed_is_not_taken_up(
    llama: Path, text: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What comes after this is not looked at before it is run.
    monkeypatch.setattr("anysize.calibration.data._SAMPLE_TOKENS", 256)
    data, spoken, mute = tmp_path / "data.txt", tmp_path / "spoken", tmp_path / "mute"
    data.write_text(text.read_text())
    shutil.copytree(llama, spoken)
    # With a tokenizer of its own, another one would be refused.
    shutil.copytree(llama, mute, ignore=shutil.ignore_patterns("tokenizer*"))

    def run(progress: Progress) -> None:
        calibrated(
            Checkpoint(mute), str(data), CalibrationOptions(SHAPE), tokenizer=str(spoken), output=tmp_path / NAME,
            progress=progress,
        )  # fmt: skip

    with pytest.raises(Killed):
        run(killed_in("calibrate", 4))
    if what == "data":
        data.write_text(" ".join(reversed(text.read_text().split())))
    elif what == "the rest of the data":
        with data.open("a") as file:
            file.write(" w3" * 1000)
    elif what == "the format of scores":
        monkeypatch.setattr("anysize.calibration.share.FORMAT", 99)
    else:
        tokenizer = spoken / "tokenizer.json"
        ids = {'"w3"': '"other"', '"w4"': '"w3"', '"other"': '"w4"'}
        for old, new in ids.items():
            tokenizer.write_text(tokenizer.read_text().replace(old, new))
    started_at: list[int] = []
    run(lambda _stage, done, _total: started_at.append(done))
    assert started_at[0] == 0


def test_a_refusal_on_the_way_leaves_nothing(
    new_llama: Callable[..., Path], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = new_llama(tmp_path / "small", vocab_size=40)
    # What the model does not know comes after what is looked at before the first batch.
    monkeypatch.setattr("anysize.calibration.data._SAMPLE_TOKENS", 64)
    (tmp_path / "data.txt").write_text("w3 " * 640 + "w50 " * 640)
    (tmp_path / "out").mkdir()
    seen: list[list[str]] = []
    with pytest.raises(InputError, match="this tokenizer is not the model's"):
        calibrated(
            Checkpoint(small), str(tmp_path / "data.txt"), CalibrationOptions(SHAPE), tokenizer=str(llama),
            output=tmp_path / "out" / NAME, progress=lambda *_: seen.append(names_in(tmp_path / "out")),
        )  # fmt: skip
    assert seen[-1] == [LOCK, PARTIAL]
    assert not names_in(tmp_path / "out")


@pytest.mark.parametrize("name", ["missing/scores.safetensors", "folder"])
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("anysize.calibration.calibrate.loaded_source", lambda *_, **__: pytest.fail("it was loaded"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"cannot save the scores as '.*': (its folder does not|it is a folder)"):
        calibrated(Checkpoint(llama), str(text), CalibrationOptions(), output=tmp_path / name, progress=quiet)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "data.txt", "scores", "plan.safetensors"])
def test_an_output_that_would_take_the_place_of_something_else_is_refused(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("anysize.calibration.calibrate.loaded_source", lambda *_, **__: pytest.fail("it was loaded"))
    source = shutil.copytree(llama, tmp_path / "source")
    shutil.copy(text, source / "data.txt")
    # What anysize itself wrote, a plan's matrices, is no scores file either.
    save_file({"map": torch.zeros(1)}, source / "plan.safetensors", {"anysize": "[]"})
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(OutputError, match=r"cannot save the scores as '.*': (they would take|called like that)"):
        calibrated(
            Checkpoint(source), str(source / "data.txt"), CalibrationOptions(SHAPE), output=source / name,
            progress=quiet,
        )  # fmt: skip
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_scores_take_the_place_of_scores_of_any_format(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / NAME
    save_file({"old": torch.zeros(1)}, output, {"anysize": json.dumps({"format": 1, "model_sha256": ""})})
    for _ in range(2):
        calibrated(Checkpoint(llama), str(text), CalibrationOptions(SHAPE), output=output, progress=quiet)
        assert Scores.load(output).record.tokens
    assert names_in(tmp_path) == [NAME]


@pytest.mark.parametrize("when", ["meanwhile", "at the end"])
def test_an_output_that_fails_later_is_one_sentence_and_the_next_run_goes_on(
    llama: Path, text: Path, tmp_path: Path, when: str
) -> None:
    output = tmp_path / NAME
    in_the_way = tmp_path / PARTIAL if when == "meanwhile" else output

    def block(stage: str, _done: int, _total: int) -> None:
        # A folder stands where the file should go.
        if stage == "calibrate":
            in_the_way.mkdir(exist_ok=True)

    def run(progress: Progress) -> None:
        calibrated(Checkpoint(llama), str(text), CalibrationOptions(SHAPE), output=output, progress=progress)

    with pytest.raises(OutputError, match="cannot keep the sums" if when == "meanwhile" else "cannot save the scores"):
        run(block)
    in_the_way.rmdir()
    assert names_in(tmp_path) == ([] if when == "meanwhile" else [PARTIAL])
    started_at: list[int] = []
    run(lambda _stage, done, _total: started_at.append(done))
    assert (started_at[0] > 0) == (when == "at the end")
    assert names_in(tmp_path) == [NAME]
