"""Plan files that cannot be used are refused in one sentence, and nothing is made of them."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import anysize
from anysize.errors import ArchitectureError, CheckpointError, OutputError, ProofError
from anysize.recipe import Plan

Run = Callable[..., Any]


def spoilt(llama: Path, **changes: Any) -> str:
    return json.dumps({**json.loads(anysize.plan(llama, hidden_size=48).to_json()), **changes})


BAD: dict[str, tuple[Callable[[Path], str | None], str]] = {
    "missing": (lambda _: None, "cannot read the plan '"),
    "empty": (lambda _: "", "is not a plan: it: Invalid JSON"),
    "not JSON": (lambda _: "{", "is not a plan: it: Invalid JSON"),
    "a list": (lambda _: "[]", "is not a plan: it: Input should be an object"),
    "another object": (lambda _: '{"a": 1}', "is not a plan: anysize_version: Field required; source: Field required"),
    "another format": (lambda llama: spoilt(llama, format=2), "is not a plan: format: Input should be 1"),
    "an extra field": (lambda llama: spoilt(llama, note="x"), "is not a plan: note: Extra inputs are not permitted"),
    "a wrong type": (
        lambda llama: spoilt(llama, recipes="all"),
        "is not a plan: recipes: Input should be a valid array",
    ),
    "a run outside its axis": (
        lambda llama: spoilt(llama, axes={"hidden": {"source_size": 4, "runs": [[3, 2]]}}),
        "is not a plan: axes.hidden: Value error, run (3, 2) does not lie in a source of 4",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_plan_is_one_sentence(llama: Path, tmp_path: Path, cli: Run, name: str) -> None:
    make, why = BAD[name]
    text = make(llama)
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    before = list(tmp_path.iterdir())
    ran = cli("apply", tmp_path / "plan.json", tmp_path / "out")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("anysize: ")
    assert ran.err.count("\n") == 1
    assert why in ran.err
    assert list(tmp_path.iterdir()) == before


def test_a_binary_file_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot read the plan '"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_cannot_be_saved_where_no_folder_is(llama: Path, tmp_path: Path, cli: Run) -> None:
    ran = cli("plan", llama, "--hidden-size", 48, "-o", tmp_path / "absent" / "plan.json")
    assert ran.code == 2
    place = f"{tmp_path}/absent/plan.json"
    assert ran.err == f"anysize: cannot save the plan as '{place}': its folder does not exist, make it first\n"


def test_a_plan_of_a_family_without_a_table_is_refused(llama: Path, tmp_path: Path) -> None:
    plan = anysize.plan(llama, hidden_size=48)
    alien = plan.model_copy(update={"target_config": {**plan.target_config, "model_type": "lama"}})
    with pytest.raises(ArchitectureError, match=r"model_type 'lama' has no table \(did you mean 'llama'\?\)"):
        anysize.apply(alien, tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (lambda recipes: recipes[1:], "model.embed_tokens.weight is not made"),
        (lambda recipes: (*recipes, recipes[0]), "model.embed_tokens.weight is made 2 times"),
        (lambda recipes: (*recipes, recipes[0].model_copy(update={"name": "odd"})), "odd is made but the target has"),
        (
            lambda recipes: (recipes[0].model_copy(update={"shape": (61, 47)}), *recipes[1:]),
            "model.embed_tokens.weight is made as [61, 47], the target config wants [61, 48]",
        ),
        (
            lambda recipes: tuple(r.model_copy(update={"source": recipes[0].source}) for r in recipes),
            "of the source is neither used nor dropped",
        ),
        (
            lambda recipes: (*recipes[:-1], recipes[-1].model_copy(update={"source": "ghost"})),
            "is made of ghost, which the source does not hold",
        ),
        (
            lambda recipes: (recipes[0].model_copy(update={"source_dtype": "BF16"}), *recipes[1:]),
            "is made of model.embed_tokens.weight as BF16 [61, 32], the source holds F32 [61, 32]",
        ),
        (
            lambda recipes: (recipes[0].model_copy(update={"arrow": "vocab -> expert"}), *recipes[1:]),
            "runs along expert, for which the plan has no map",
        ),
        (
            lambda recipes: (recipes[0].model_copy(update={"arrow": "vocab -> ffn"}), *recipes[1:]),
            "its arrow and the plan's maps make",
        ),
    ],
    ids=["missing", "twice", "odd", "shape", "unused", "ghost", "type", "axis", "arrow"],
)
def test_a_plan_that_does_not_account_for_every_tensor_is_refused(
    llama: Path, tmp_path: Path, edit: Callable[[Any], Any], why: str
) -> None:
    plan = anysize.plan(llama, hidden_size=48)
    wrong = plan.model_copy(update={"recipes": edit(plan.recipes)})
    with pytest.raises(ProofError) as refusal:
        anysize.apply(wrong, tmp_path / "out")
    assert why in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", ["plan", "matrices"])
def test_an_earlier_plan_stays_whole_where_another_cannot_be_saved(
    llama: Path, scores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    first, second = (anysize.plan(llama, hidden_size=size, calibration=scores) for size in (16, 24))
    first.save(tmp_path / "plan.json")
    write = Path.write_bytes

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "plan":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        monkeypatch.setattr("anysize.dense.save_one_by_one", full)
    with pytest.raises(OutputError, match=r"cannot save the plan as '.*plan\.json': No space left on device"):
        second.save(tmp_path / "plan.json")
    monkeypatch.setattr(Path, "write_bytes", write)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    assert Plan.load(tmp_path / "plan.json").to_json() == first.to_json()
    assert first.to_json() != second.to_json()


def test_the_size_of_a_source_counts_what_goes(llama: Path) -> None:
    plan = anysize.plan(llama, num_hidden_layers=1, layers="0")
    source = sum(tensor.numel() for tensor in load_file(llama / "model.safetensors").values())
    assert plan.source_num_parameters == source > 1.3 * plan.num_parameters
    assert plan.source_num_bytes == 4 * source
    half = anysize.plan(llama, keep_tokens=list(range(40)))
    assert half.source_num_parameters == source
