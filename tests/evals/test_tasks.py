"""lm-eval's figures on our task files against log-probabilities that are summed by hand, on a real pretrained model."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import Table, parquet

import anysize
from anysize.errors import InputError
from anysize.evals import harness
from anysize.evals.harness import FOLDER, known_tasks
from anysize.evals.questions import read
from anysize.io.models import quiet_transformers, tokenizer_of

SHARED = Path(__file__).parents[3] / "shared" / "data"
MODEL = SHARED / "stories260K"
with_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: it is an extra")
with_data = pytest.mark.skipif(not (SHARED / "eval").is_dir(), reason="the task data are not beside this checkout")


def rows_of(name: str) -> list[dict[str, Any]]:
    return parquet.read_table(SHARED / "eval" / f"{name}.parquet").to_pylist()


@pytest.fixture(scope="module")
def told() -> Any:
    """A function that says how likely the stock model finds text after a prompt, and whether it is the greedy one."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    tokenizer: Any = tokenizer_of(str(MODEL))

    def log_probability(prompt: str, text: str) -> tuple[float, bool]:
        whole = tokenizer(prompt + text, verbose=False)["input_ids"]
        begin = len(tokenizer(prompt, verbose=False)["input_ids"])
        whole, cut = whole[-513:], max(0, len(whole) - 513)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
        wanted = torch.tensor(whole[begin - cut :])
        part = logits[-len(wanted) :]
        return float(part.gather(-1, wanted[:, None]).sum()), bool((part.argmax(-1) == wanted).all())

    return log_probability


def evaluated(tasks: list[str], folder: Path, limit: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        # What lm-eval's own imports warn about is not ours to mend.
        warnings.simplefilter("ignore")
        found = anysize.evaluate(MODEL, tasks=tasks, task_data=folder, limit=limit)
    assert [score.task for score in found.tasks] == tasks
    assert found.text is None
    return {score.task: score for score in found.tasks}


@with_lm_eval
@with_data
def test_passages_and_questions_score_as_summed_by_hand(told: Any) -> None:
    limit = 12
    found = evaluated(["piqa", "lambada_openai", "arc_easy", "openbookqa"], SHARED / "eval", limit)

    passages = [told(row["context"], " " + row["continuation"]) for row in rows_of("lambada_openai")[:limit]]
    mean = sum(value for value, _ in passages) / limit
    lambada = found["lambada_openai"]
    assert lambada.metrics["perplexity"] == pytest.approx(exp(-mean), rel=1e-4)
    assert lambada.metrics["acc"] == pytest.approx(sum(greedy for _, greedy in passages) / limit)
    assert lambada.num_examples == limit
    for name, prompt in (("arc_easy", "{}\nAnswer:"), ("piqa", "{}\nAnswer:"), ("openbookqa", "{}")):
        right = normed = 0
        for row in rows_of(name)[:limit]:
            asked = prompt.format(row["query"].strip())
            nats = [told(asked, " " + choice)[0] for choice in row["choices"]]
            per_character = [value / len(choice) for value, choice in zip(nats, row["choices"], strict=True)]
            right += nats.index(max(nats)) == row["gold"]
            normed += per_character.index(max(per_character)) == row["gold"]
        assert found[name].metrics == {"acc": pytest.approx(right / limit), "acc_norm": pytest.approx(normed / limit)}
        share = right / limit
        assert found[name].standard_errors["acc"] == pytest.approx((share * (1 - share) / (limit - 1)) ** 0.5)


@with_lm_eval
@with_data
def test_blimp_is_the_mean_of_its_paradigms_and_each_scores_as_summed_by_hand(told: Any, tmp_path: Path) -> None:
    limit = 3
    chosen: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of("blimp"):
        of = chosen.setdefault(row["UID"], [])
        if len(of) < limit:
            of.append(row)
    parquet.write_table(Table.from_pylist([row for of in chosen.values() for row in of]), tmp_path / "blimp.parquet")

    blimp = evaluated(["blimp"], tmp_path, 1000)["blimp"]

    def likelier(row: dict[str, Any]) -> bool:
        good, bad = (told("", " " + row[name])[0] for name in ("sentence_good", "sentence_bad"))
        return good > bad

    wanted = {name: sum(map(likelier, of)) / limit for name, of in chosen.items()}
    assert {part.task: part.metrics["acc"] for part in blimp.parts} == pytest.approx(wanted)
    assert blimp.metrics["acc"] == pytest.approx(sum(wanted.values()) / 67)
    assert 0.4 < blimp.metrics["acc"] < 0.9, (
        "a model that knows some English is neither at chance on no pair nor perfect"
    )
    assert (blimp.num_examples, len(blimp.parts)) == (67 * limit, 67)
    assert blimp.standard_errors["acc"] == pytest.approx(
        sum(p.standard_errors["acc"] ** 2 for p in blimp.parts) ** 0.5 / 67
    )


@with_data
def test_the_paradigms_are_those_of_the_data() -> None:
    class Reader(yaml.SafeLoader):
        pass

    Reader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))  # type: ignore[arg-type]
    told = yaml.load((FOLDER / "blimp.yaml").read_text(), Reader)
    names = [task["task"] for task in told["task"]]
    assert names == list(dict.fromkeys(row["UID"] for row in rows_of("blimp")))
    assert [task["dataset_kwargs"]["paradigm"] for task in told["task"]] == names
    assert told["custom_dataset"] == f"{read.__module__}.{read.__name__}"


def test_every_task_file_is_shipped_and_names_its_own_data() -> None:
    assert known_tasks() == ["arc_easy", "blimp", "lambada_openai", "openbookqa", "piqa"]
    for name in known_tasks():
        assert f"{name}.parquet" in (FOLDER / f"{name}.yaml").read_text()


GOOD = {"query": "Why?", "choices": ["a", "b"], "gold": 1}


@pytest.mark.parametrize(
    ("rows", "kind", "sentence"),
    [
        ([{"query": "Why?", "gold": 0}], "question", "has no column choices: it has query; gold"),
        ([GOOD, {**GOOD, "gold": 2}], "question", "row 1 .*: gold is 2, and there are 2 choices"),
        ([{**GOOD, "choices": ["a", ""]}], "question", r"row 0 .*: choices are \['a', ''\], wanted texts"),
        ([{**GOOD, "query": None}], "question", "query is None, wanted a str"),
        ([{"context": "", "continuation": "x"}], "passage", "context is '', wanted a str"),
        (
            [{"UID": "p", "sentence_good": "x", "sentence_bad": "y"}],
            "pair",
            "no rows of the paradigm 'wh_island'",
        ),
    ],
)
def test_task_data_that_cannot_be_used_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], kind: str, sentence: str
) -> None:
    parquet.write_table(Table.from_pylist(rows), tmp_path / "x.parquet")
    paradigm = "wh_island" if kind == "pair" else ""
    with pytest.raises(InputError, match=sentence):
        read(task_data=str(tmp_path), file="x.parquet", kind=kind, paradigm=paradigm)


def test_rows_come_as_they_are_whatever_else_lm_eval_says(tmp_path: Path) -> None:
    parquet.write_table(Table.from_pylist([GOOD, {**GOOD, "gold": 0}]), tmp_path / "x.parquet")
    found = read(task_data=str(tmp_path), file="x.parquet", kind="question", pretrained="model", version=1)
    assert found["test"].to_list() == [GOOD, {**GOOD, "gold": 0}]


def test_a_damaged_task_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(InputError, match="cannot read the task file"):
        read(task_data=str(tmp_path), file="x.parquet", kind="question")


@with_lm_eval
def test_a_refusal_comes_through_lm_eval(llama: Path, tmp_path: Path) -> None:
    parquet.write_table(Table.from_pylist([{**GOOD, "gold": -1}]), tmp_path / "piqa.parquet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="gold is -1"):
            anysize.evaluate(llama, tasks=["piqa"], task_data=tmp_path)


@with_lm_eval
def test_tasks_are_read_before_anything_is_measured(llama: Path, text: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    (tmp_path / "piqa.parquet").write_bytes(b"PAR1 nothing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="cannot read the task file"):
            anysize.evaluate(llama, text, tasks=["piqa"], task_data=tmp_path, progress=lambda *told: heard.append(told))
    assert heard == []


def test_tasks_of_text_are_refused_for_an_image_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests import tiny

    monkeypatch.setattr(harness, "find_spec", lambda _name: True)
    (tmp_path / "piqa.parquet").touch()
    vit = tiny.model(next(v for v in tiny.VARIANTS if v.family == "vit"), dtype=torch.float32)
    heard: list[tuple[str, int, int]] = []
    for data in (None, tmp_path / "piqa.parquet"):
        with pytest.raises(InputError, match=r"the tasks piqa are text, and '\w+' reads images"):
            anysize.evaluate(vit, data, tasks=["piqa"], task_data=tmp_path, progress=lambda *told: heard.append(told))
    assert heard == []


QUESTION = {"query": "w5 w6", "choices": ["w7", "w8 w9"], "gold": 0}
PASSAGE = {"context": "w5 w6", "continuation": "w7"}


@with_lm_eval
@pytest.mark.parametrize(("task", "row"), [("piqa", QUESTION), ("lambada_openai", PASSAGE)])
def test_a_model_that_says_nan_has_no_score(llama: Path, tmp_path: Path, task: str, row: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    parquet.write_table(Table.from_pylist([row]), tmp_path / f"{task}.parquet")
    with quiet_transformers():
        model: Any = AutoModelForCausalLM.from_pretrained(llama)
    asked: Any = {"tasks": [task], "task_data": tmp_path, "tokenizer": str(llama)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert anysize.evaluate(model, **asked).tasks[0].num_examples == 1
        torch.nn.init.constant_(model.model.norm.weight, float("nan"))
        with pytest.raises(InputError, match="the model's log-likelihood is nan on these data: weights hold NaN"):
            anysize.evaluate(model, **asked)
