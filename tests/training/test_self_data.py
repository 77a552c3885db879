"""Self-data distillation: sequences begin as the data do and go on as the teacher does, kept in a folder if given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from anysize.errors import InputError
from anysize.training.config import SelfData, train_config
from anysize.training.self_data import Continuations, continued
from anysize.training.start import load
from tests.conftest import Ran
from tests.training.test_run import config_of, record, written
from tests.training.test_run import story as story

Run = Callable[..., Ran]


@pytest.fixture
def teacher(llama: Path) -> Any:
    return load(str(llama), torch.float32).eval()


def _ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 50, (rows, 12), generator=torch.Generator().manual_seed(1))


def test_the_likeliest_words_are_those_of_generate(teacher: Any) -> None:
    ids = _ids()
    found = continued(teacher, ids, SelfData(prompt_tokens=5, temperature=0), 0)
    greedy = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert torch.equal(found, teacher.generate(ids[:, :5], generation_config=greedy))
    assert not torch.equal(found, ids)


def test_words_are_drawn_from_the_teachers_distribution(teacher: Any) -> None:
    prompt = _ids(1)[:, :4]
    ids = prompt.repeat(4000, 1)
    ids = torch.cat([ids, ids[:, :1]], dim=1)
    for temperature in (1.0, 0.3):
        found = continued(teacher, ids, SelfData(prompt_tokens=4, temperature=temperature), 7)[:, 4]
        with torch.no_grad():
            wanted = (teacher(input_ids=prompt).logits[0, -1] / temperature).softmax(-1)
        share = torch.bincount(found, minlength=len(wanted)) / len(found)
        # Half the sum of differences of 4,000 draws from about 60 words is near 0.05.
        assert float((share - wanted).abs().sum()) / 2 < 0.08


def test_a_seed_says_the_words_and_leaves_the_run_alone(teacher: Any) -> None:
    options, ids = SelfData(prompt_tokens=2), _ids()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    first = continued(teacher, ids, options, 5)
    assert torch.equal(torch.rand(4), wanted)
    assert torch.equal(continued(teacher, ids, options, 5), first)
    assert not torch.equal(continued(teacher, ids, options, 6), first)
    assert torch.equal(first[:, :2], ids[:, :2])


def test_words_that_were_said_are_read_again(teacher: Any, tmp_path: Path) -> None:
    def words(identity: str = "a") -> Continuations:
        return Continuations(teacher, SelfData(prompt_tokens=2), folder=str(tmp_path), identity=identity,
                             num_sequences=9, length=12, num_classes=64)  # fmt: skip

    ids, rows = _ids(), torch.tensor([4, 0, 8])
    first = words().of(ids, rows, 5)
    assert torch.equal(words().of(ids, rows, 6), first)
    assert not torch.equal(words("b").of(ids, rows, 6), first)
    assert torch.equal(words().of(ids[:1], rows[:1], 6), first[:1])


def test_a_run_learns_them(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    def run(name: str, distill: dict[str, Any] | None) -> dict[str, Any]:
        changes = {"distill": {"teacher": str(llama), **distill}} if distill else {}
        done = cli("train", written(tmp_path / f"{name}.yaml", config_of(llama, story, tmp_path / name, **changes)))
        assert done.code == 0, done.err
        return record(tmp_path / name)

    words = {"weight": 0, "self_data": {"prompt_tokens": 4}, "cache": str(tmp_path / "kept")}
    plain, own, again = run("plain", None), run("own", words), run("again", words)
    # The run starts from its teacher, which finds its own words likelier than the story's.
    assert own["losses"][0]["loss"] < plain["losses"][0]["loss"] - 0.1
    assert own["teacher_s"] > 0
    assert again["losses"] == own["losses"]


def test_what_makes_no_sense_is_refused(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    raw = config_of(llama, story, tmp_path / "out", distill={"teacher": str(llama), "weight": 0})
    with pytest.raises(InputError, match="nothing would be learned from the teacher"):
        train_config(raw, "c.yaml")
    raw["distill"] |= {"self_data": {"prompt_tokens": 32}}
    done = cli("train", written(tmp_path / "c.yaml", raw))
    assert done.code == 2
    assert "a sequence has 32" in done.err
    assert not (tmp_path / "out").exists()
