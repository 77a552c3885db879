"""Every verifier catches the mistake it is there for, and a failed proof leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.api import apply_with_proof
from anysize.arch import llama as llama_table
from anysize.arch.schema import Architecture, Norm, Parameter
from anysize.errors import ProofError
from anysize.io.reader import Checkpoint, read_header
from anysize.planner import make_plan
from anysize.proof import algebra, miniature
from anysize.proof.coverage import check_written
from anysize.proof.verdict import Check, Verification
from anysize.recipe import Options, Plan, Recipe

SIZES = {"hidden_size": 48, "intermediate_size": 61, "num_key_value_heads": 3, "num_hidden_layers": 3}
LAYER = "model.layers.0"


@pytest.fixture(scope="module")
def plan(llama: Path) -> Plan:
    return make_plan(Checkpoint(llama), SIZES, Options(preset="split"))


@pytest.fixture(scope="module")
def written(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output, _ = apply_with_proof(plan, tmp_path_factory.mktemp("out") / "out", verify="off")
    return output


def table(**changes: Any) -> Architecture:
    return llama_table.ARCHITECTURE.derive("llama", ("LlamaForCausalLM",), **changes)


def parameters(changes: dict[str, str]) -> dict[str, Parameter]:
    found = dict(llama_table.ARCHITECTURE.parameters)
    for end, arrow in changes.items():
        for name, parameter in found.items():
            if name.endswith(end):
                found[name] = Parameter(arrow, parameter.when)
    return found


NORMS = llama_table.ARCHITECTURE.norms
WRONG_TABLES: dict[str, dict[str, Any]] = {
    "kv and group swapped": {"parameters": parameters({"q_proj.weight": "norm(hidden) -> (group kv query(head))"})},
    "heads read in another order": {"parameters": parameters({"o_proj.weight": "(group kv head) -> hidden"})},
    "channels before heads": {"parameters": parameters({"v_proj.weight": "norm(hidden) -> (head kv)"})},
    "gain stored otherwise": {"norms": {name: Norm("rms", "hidden", "norm(hidden)", gain="1+w") for name in NORMS}},
    "branch norm for a pre-norm": {"norms": {**NORMS, "model.norm": Norm("rms", "hidden", "hidden")}},
    "embedding scaled": {
        "parameters": {
            **llama_table.ARCHITECTURE.parameters,
            "model.embed_tokens.weight": Parameter("vocab -> hidden, stored in x out", times="hidden"),
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_the_miniature_refuses_a_wrong_table(
    name: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("anysize.config", "anysize.arch"):
        monkeypatch.setattr(f"{module}.table", lambda _type: table(**WRONG_TABLES[name]))
    asked = {**SIZES, "num_attention_heads": 9, "hidden_size": 54}
    with pytest.raises(ProofError, match=r"the miniature proof failed, .*(miniature|permute)"):
        anysize.resize(llama, tmp_path / "out", **asked)
    assert list(tmp_path.iterdir()) == []


def changed(plan: Plan, end: str, **fields: Any) -> Plan:
    recipes = [r.model_copy(update=fields) if r.name.endswith(end) else r for r in plan.recipes]
    assert recipes != list(plan.recipes)
    return plan.model_copy(update={"recipes": tuple(recipes)})


def test_the_miniature_measures_what_is_right_and_what_is_wrong(plan: Plan) -> None:
    proof = miniature.prove_on_miniature(plan)
    assert proof.passed
    assert {c.name for c in proof.checks} == {"miniature", *(f"permute {a}" for a in ("hidden", "ffn", "kv", "group"))}
    assert all(c.measured < 1e-12 and c.control is not None and c.control > 1e-2 for c in proof.checks)


def rows(plan: Plan, llama: Path, output: Path) -> Check:
    places = {n: i for path in output.glob("*.safetensors") for n, i in read_header(path).items()}
    return algebra.check_rows(plan, algebra.rows_of(Checkpoint(llama)), algebra.rows_from_files(places))


def test_rows_of_a_right_output_pass(plan: Plan, llama: Path, written: Path) -> None:
    check = rows(plan, llama, written)
    assert check.passed
    assert check.control is not None
    assert check.control > 1e4 * check.measured


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def edit(state: dict[str, torch.Tensor]) -> None:
        state[one], state[other] = state[other].clone(), state[one].clone()

    return edit


def roll(name: str, dim: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.update({name: state[name].roll(1, dims=dim).contiguous()})


TAMPERED: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "gate and up swapped": swap(f"{LAYER}.mlp.gate_proj.weight", f"{LAYER}.mlp.up_proj.weight"),
    "layers swapped": swap(f"{LAYER}.self_attn.o_proj.weight", "model.layers.2.self_attn.o_proj.weight"),
    "rows turned": roll(f"{LAYER}.self_attn.q_proj.weight", 0),
    "columns turned": roll(f"{LAYER}.mlp.down_proj.weight", 1),
    "a tensor of zeros": lambda s: s[f"{LAYER}.self_attn.k_proj.weight"].zero_(),
    "a tensor twice as large": lambda s: s[f"{LAYER}.mlp.down_proj.weight"].mul_(2),
    "a tensor of NaN": lambda s: s[f"{LAYER}.mlp.down_proj.weight"].fill_(float("nan")),
    "gains of one": lambda s: s[f"{LAYER}.input_layernorm.weight"].fill_(1),
    "an identity layer that is none": lambda s: s["model.layers.1.mlp.down_proj.weight"].fill_(0.01),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_rows_of_a_tampered_output_fail(plan: Plan, llama: Path, written: Path, tmp_path: Path, name: str) -> None:
    state = load_file(written / "model.safetensors")
    TAMPERED[name](state)
    save_file(state, tmp_path / "model.safetensors")
    assert not rows(plan, llama, tmp_path).passed


def test_written_tensors_are_counted(plan: Plan, written: Path, tmp_path: Path) -> None:
    assert check_written(plan, written).passed
    state = load_file(written / "model.safetensors")
    for edit in (
        lambda s: s.pop("model.norm.weight"),
        lambda s: s.update(odd=torch.ones(2)),
        lambda s: s.update({"model.norm.weight": torch.ones(3)}),
        lambda s: s.update({"model.norm.weight": s["model.norm.weight"].double()}),
    ):
        wrong = dict(state)
        edit(wrong)
        save_file(wrong, tmp_path / "model.safetensors")
        assert not check_written(plan, tmp_path).passed


@pytest.mark.parametrize("name", ["gate and up swapped", "columns turned", "gains of one"])
def test_the_comparison_of_whole_models_catches_a_tampered_output(
    llama: Path, written: Path, tmp_path: Path, name: str
) -> None:
    assert anysize.verify(llama, written).passed
    for path in written.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "anysize.json").unlink()
    state = load_file(written / "model.safetensors")
    TAMPERED[name](state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    failed = {c.name for c in anysize.verify(llama, tmp_path).checks if not c.passed}
    assert {"logits", "logits KL", "cache"} <= failed


def test_a_control_that_measures_nothing_fails_its_check() -> None:
    blind = Check(name="c", what="w", unit="u", measured=0.0, tolerance=1e-5, control=5e-5)
    seeing = blind.model_copy(update={"control": 0.5})
    assert seeing.passed
    assert not blind.passed
    assert "the control measured only" in Verification(checks=(blind,)).failures[0]


def test_a_check_that_measures_nan_fails() -> None:
    assert not Check(name="c", what="w", unit="u", measured=float("nan"), tolerance=1.0).passed


def test_a_failed_proof_exits_1_and_leaves_nothing(
    llama: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.executor import TensorJob

    block = TensorJob.block
    monkeypatch.setattr(TensorJob, "block", lambda job, i: block(job, i) * (1.5 if "o_proj" in job.recipe.name else 1))
    monkeypatch.setattr("anysize.proof.miniature.prove_on_miniature", lambda _plan: Verification(checks=()))
    ran = cli("resize", llama, tmp_path / "out", "--hidden-size", 64, "--preset", "split")
    assert ran.code == 1
    assert "anysize: the proof of the written tensors failed" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_edited_by_hand_fails_its_proof(plan: Plan, tmp_path: Path) -> None:
    edited = changed(plan, "mlp.down_proj.weight", share="none")
    with pytest.raises(ProofError):
        apply_with_proof(edited, tmp_path / "out", verify="auto")
    assert list(tmp_path.iterdir()) == []


def test_recipes_are_what_the_controls_change(plan: Plan) -> None:
    assert all(isinstance(recipe, Recipe) for recipe in plan.recipes)
    assert any(recipe.share == "random" for recipe in plan.recipes)
