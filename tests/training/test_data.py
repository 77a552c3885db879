"""Training data: packed, kept once, found again, and refused where they cannot be used."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from anysize.calibration.data import tokenizer_of
from anysize.config import understand
from anysize.errors import InputError
from anysize.io.image_processor import image_processor_of
from anysize.io.reader import Checkpoint
from anysize.progress import quiet
from anysize.training.config import Data
from anysize.training.data import datasets_of
from anysize.training.images import Images, flipped
from anysize.training.tokens import Packed, Sequences, StreamedSequences, packed, stacked
from tests import image_files, tiny


def words(path: Path, *documents: str) -> str:
    parquet.write_table(pa.table({"text": list(documents), "n": list(range(len(documents)))}), path)
    return str(path)


def of(data: str, source: Path, most: int | None = None) -> Packed:
    return packed(data, "", tokenizer_of(str(source)), 61, most, quiet)


def test_documents_follow_one_another_with_an_end_token_between(llama: Path, tmp_path: Path) -> None:
    made = of(words(tmp_path / "a.parquet", "w3 w4 w5", "w6 w7"), llama)
    ids = made.ids.tolist()
    assert sorted([ids[: ids.index(1) + 1], ids[ids.index(1) + 1 :]]) == [[3, 4, 5, 1], [6, 7, 1]]
    assert (made.num_tokens, made.num_bytes) == (7, 13)
    assert made.bits_per_byte == pytest.approx(7 / 13 / math.log(2))


def test_documents_without_a_word_are_refused(llama: Path, tmp_path: Path) -> None:
    # End tokens alone are tokens, but have no bytes.
    data = words(tmp_path / "a.parquet", "", "", "")
    for _ in range(2):
        with pytest.raises(InputError, match="hold no text: every document that was read is empty"):
            of(data, llama)


def test_rows_without_text_are_no_documents(llama: Path, tmp_path: Path) -> None:
    rows = ["", "w3 w4 w5", None, "", None]
    parquet.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    made = of(str(tmp_path / "a.parquet"), llama)
    assert made.ids.tolist() == [3, 4, 5, 1]
    streamed = iter(StreamedSequences(str(tmp_path / "a.parquet"), "", tokenizer_of(str(llama)), 61, 4))
    assert next(streamed)["input_ids"].tolist() == [3, 4, 5, 1]
    nothing = words(tmp_path / "b.parquet", "", "", "")
    with pytest.raises(InputError, match="hold no text: every document that was read is empty"):
        next(iter(StreamedSequences(nothing, "", tokenizer_of(str(llama)), 61, 2)))


def test_sequences_cover_the_tokens_once(llama: Path, text: Path) -> None:
    made = of(str(text), llama)
    sequences = Sequences(made, 64, least=1, data=str(text))
    found = torch.cat([sequences[i]["input_ids"] for i in range(len(sequences))])
    assert len(sequences) == made.num_tokens // 64
    assert np.array_equal(found.numpy(), made.ids[: len(found)])
    batch = stacked([sequences[0], sequences[3]])
    assert batch["input_ids"].shape == (2, 64)
    assert batch["sequence"].tolist() == [0, 3]


def test_what_was_tokenized_is_found_again_until_the_data_change(llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "a.parquet"
    seen: list[int] = []

    def count(*_: object) -> None:
        seen.append(1)

    def make() -> list[int]:
        return packed(str(data), "", tokenizer_of(str(llama)), 61, None, count).ids.tolist()

    words(data, "w3 w4")
    assert make() == make() == [3, 4, 1]
    assert len(seen) == 1
    words(data, "w3 w5 w6")
    assert make() == [3, 5, 6, 1]


def test_at_most_so_many_tokens(llama: Path, text: Path) -> None:
    whole, part = of(str(text), llama), of(str(text), llama, 100)
    assert part.num_tokens == 100
    assert np.array_equal(part.ids, whole.ids[:100])
    assert part.bits_per_byte == pytest.approx(whole.bits_per_byte, rel=0.01)


def test_streamed_sequences_are_those_that_are_kept(llama: Path, text: Path) -> None:
    kept = Sequences(of(str(text), llama), 64, least=1, data="")
    stream = StreamedSequences(str(text), "", tokenizer_of(str(llama)), 61, 64)
    streamed = list(itertools.islice(stream, 2 * len(kept) + 3))
    # They come again from the start, so that a run may go on in any pass.
    assert all(torch.equal(a["input_ids"], kept[i % len(kept)]["input_ids"]) for i, a in enumerate(streamed))


def test_a_stream_without_one_sequence_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    with pytest.raises(InputError, match="hold 4 tokens, too few for one sequence of 64"):
        next(iter(StreamedSequences(str(tmp_path / "short.txt"), "", tokenizer_of(str(llama)), 61, 64)))


def test_a_foreign_tokenizer_is_refused_even_where_its_tokens_are_kept(llama: Path, tmp_path: Path) -> None:
    data = words(tmp_path / "a.parquet", "w3 w60")
    of(data, llama)
    for _ in range(2):
        with pytest.raises(InputError, match="gives id 60, the model has 50 tokens"):
            packed(data, "", tokenizer_of(str(llama)), 50, None, quiet)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sequence_length": 129}, "sequence_length is 129, and the model has positions for 128"),
        ({"max_tokens": 300, "sequence_length": 128}, "2 sequences of 128; wanted at least 8, one step"),
        ({"train": "nowhere.txt"}, "do not exist"),
        ({"validation": "nowhere.txt"}, "do not exist"),
        ({"column": "none"}, "no column 'none'; of text they have text"),
    ],
)
def test_data_that_cannot_be_used(llama: Path, text: Path, changes: dict[str, Any], told: str) -> None:
    data = Data(**{"train": str(text), "sequence_length": 64, **changes})
    with pytest.raises(InputError, match=told):
        datasets_of(data, understand(Checkpoint(llama).config), str(llama), 8, quiet)


def pictures(path: Path, labels: list[Any], size: int = 12) -> str:
    rows: list[bytes] = []
    for i in range(len(labels)):
        file = io.BytesIO()
        Image.fromarray(np.full((size, size, 3), 10 * i, np.uint8)).save(file, "PNG")
        rows.append(file.getvalue())
    parquet.write_table(pa.table({"image": [{"bytes": r} for r in rows], "label": labels}), path)
    return str(path)


def vit() -> Any:
    return understand(tiny.source(next(v for v in tiny.VARIANTS if v.family == "vit")).config)


def test_images_are_pixels_with_their_labels(tmp_path: Path) -> None:
    data = pictures(tmp_path / "a.parquet", [0, 1, 2, 3])
    made = Images(data, ("", "label"), 7, image_processor_of("", vit()), None, quiet, least=1)
    assert len(made) == 4
    for i in range(4):
        example = made[i]
        assert example["pixel_values"].shape == (3, 12, 12)
        # The value tells which picture it is, and so its label.
        assert float(example["pixel_values"][0, 0, 0]) == pytest.approx(
            10 * int(example["labels"]) / 127.5 - 1, abs=1e-6
        )


@pytest.mark.parametrize(
    ("labels", "column", "told"),
    [([0, 9], "label", "have the label 9: wanted 0 to 6, the classes"), ([6, -1], "label", "have the label -1: wanted"),
     ([0, 1], "clas", "have no column 'clas'.*data.label_column"), (["a", "b"], "label", "hold 'a': wanted integers"),
     ([0], "label", "1 images, wanted at least 2")],
)  # fmt: skip
def test_images_that_cannot_be_used(tmp_path: Path, labels: list[Any], column: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        Images(
            pictures(tmp_path / "a.parquet", labels),
            ("", column),
            7,
            image_processor_of("", vit()),
            None,
            quiet,
            least=2,
        )


def test_text_for_an_image_model_is_refused(tmp_path: Path) -> None:
    data = Data(train=words(tmp_path / "a.parquet", "w3"), label_column="n")
    with pytest.raises(InputError, match="hold no images"):
        datasets_of(data, vit(), "", 1, quiet)


def test_flips_are_decided_by_the_seed() -> None:
    pixels = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(64)
    one, again, other = (flipped(pixels, numbers, seed) for seed in (1, 1, 2))
    # The place in a batch does not matter, so that processes may share one.
    assert torch.equal(one.flip(0), flipped(pixels.flip(0), numbers.flip(0), 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    as_it_was = (one == pixels).flatten(1).all(1)
    mirrored = (one == pixels.flip(-1)).flatten(1).all(1)
    assert bool((as_it_was | mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


@pytest.mark.parametrize("idle", [{"sequence_length": 64}, {"streaming": False}, {"tokenizer": "t"}], ids=str)
def test_what_says_nothing_about_images_is_refused(tmp_path: Path, idle: dict[str, Any]) -> None:
    data = Data(train=pictures(tmp_path / "a.parquet", [0, 1]), **idle)
    with pytest.raises(InputError, match=f"data.{next(iter(idle))}: of no use where a model reads images"):
        datasets_of(data, vit(), "", 1, quiet)


@pytest.mark.parametrize("idle", [{"label_column": "n"}, {"flip": True}], ids=str)
def test_what_says_nothing_about_text_is_refused(llama: Path, story: Path, idle: dict[str, Any]) -> None:
    data = Data(train=str(story), **idle)
    with pytest.raises(InputError, match=f"data.{next(iter(idle))}: of no use where a model reads texts"):
        datasets_of(data, understand(Checkpoint(llama).config), str(llama), 1, quiet)


def test_images_come_from_the_column_that_is_named(tmp_path: Path) -> None:
    first, second = (image_files.table(tmp_path / f"{name}.parquet", 3, label=[0, 1, 2]) for name in "ab")
    images = [parquet.read_table(place)["image"] for place in (first, second)]
    both = pa.table({"left": images[0], "right": images[1].take([2, 1, 0]), "label": [0, 1, 2]})
    parquet.write_table(both, tmp_path / "both.parquet")
    processor = image_processor_of("", vit())

    def read(column: str) -> list[torch.Tensor]:
        found = Images(str(tmp_path / "both.parquet"), (column, "label"), 7, processor, None, quiet, least=1)
        by_label = {int(found[i]["labels"]): found[i]["pixel_values"] for i in range(3)}
        return [by_label[label] for label in range(3)]

    left, right = read("left"), read("right")
    assert left[0].equal(right[2])
    assert not left[0].equal(right[0])
    assert read("")[0].equal(left[0])
    with pytest.raises(InputError, match="have no column 'middle'"):
        read("middle")
