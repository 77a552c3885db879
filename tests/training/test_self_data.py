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
from tests.training.runs import config_of, record, written

Run = Callable[..., Ran]


@pytest.fixture
def teacher(llama: Path) -> Any:
    return load(str(llama), torch.float32).eval()


def _ids(rows: int = 3) -> torch.Tensor:
    return torch.randint(3, 50, (rows, 12), generator=torch.Generator().manual_seed(1))


def test_the_likeliest_words_are_those_of_generate(teacher: Any) -> None:
    ids = _ids()
    found = continued(teacher, ids, SelfData(prompt_tokens=5, temperature=0))
    greedy = GenerationConfig(max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert torch.equal(found, teacher.generate(ids[:, :5], generation_config=greedy))
    assert not torch.equal(found, ids)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_words_are_drawn_from_the_teachers_distribution(teacher: Any, temperature: float) -> None:
    # Each beginning has draws of its own: so one beginning is told from others by a first token that changes nothing.
    prompts = torch.cartesian_prod(torch.arange(3, 50), torch.arange(3, 50), torch.arange(3, 5))
    ids = torch.cat([prompts, prompts[:, :1]], dim=1)
    found = continued(teacher, ids, SelfData(prompt_tokens=3, temperature=temperature))[:, 3]
    with torch.no_grad():
        wanted = (teacher(input_ids=prompts).logits[:, -1] / temperature).softmax(-1)
    # How often each word is expected, and how often it came.
    counts = torch.bincount(found, minlength=wanted.shape[1]).double()
    expected = wanted.double().sum(0)
    spread = (wanted.double() * (1 - wanted.double())).sum(0).sqrt()
    assert float(((counts - expected).abs() / (spread + 0.5)).max()) < 4.5
    likeliest = wanted.argmax(-1)
    assert float((found == likeliest).double().mean()) < float(wanted.max(-1).values.mean()) + 0.05


def test_a_beginning_alone_says_the_words_and_the_run_is_left_alone(teacher: Any) -> None:
    options, ids = SelfData(prompt_tokens=2), _ids()
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    first = continued(teacher, ids, options)
    assert torch.equal(torch.rand(4), wanted)
    assert torch.equal(continued(teacher, ids.flip(0), options).flip(0), first)
    other = torch.cat([ids[:, :2], ids[:, 2:].flip(0)], dim=1)
    assert torch.equal(continued(teacher, other, options), first)
    assert torch.equal(first[:, :2], ids[:, :2])
    assert not torch.equal(first, ids)


def test_words_that_were_said_are_read_again(teacher: Any, tmp_path: Path) -> None:
    def words(identity: str = "a") -> Continuations:
        return Continuations(teacher, SelfData(prompt_tokens=2), folder=str(tmp_path), identity=identity,
                             num_sequences=9, length=12, num_classes=64)  # fmt: skip

    ids, rows = _ids(), torch.tensor([4, 0, 8])
    first = words().of(ids, rows)
    # What is kept is not said again, whatever comes with it: other beginnings show that it was read.
    assert torch.equal(words().of(ids.flip(0), rows), first)
    mixed = words().of(torch.cat([ids.flip(0), ids[:1]]), torch.tensor([4, 0, 8, 1]))
    assert torch.equal(mixed[:3], first)
    assert torch.equal(mixed[3], first[0])
    assert not torch.equal(words("b").of(ids.flip(0), rows), first)


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
    for wrong, told in (
        ({"weight": 0, "hidden_weight": 1, "cache": "kept"}, "ask for either of them as well"),
        ({"weight": 0, "self_data": {}, "top_k": 4}, "weight is 0: top_k would do nothing"),
    ):
        raw["distill"] = {"teacher": str(llama), **wrong}
        with pytest.raises(InputError, match=told):
            train_config(raw, "c.yaml")
    assert not (tmp_path / "out").exists()
