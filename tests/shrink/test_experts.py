"""Whole experts are kept or dropped with their router rows, and what is inside each is chosen and read by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.calibration.experts import watched
from anysize.calibration.scores import Scores
from anysize.config import understand
from anysize.errors import ArchitectureError, ProofError, SizeError
from anysize.executor import target_tensors
from anysize.fit import least_squares
from anysize.io.models import NamedTensors, build_model, new_model, quiet_transformers
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.proof.coverage import account
from anysize.proof.cuts import check_cuts
from anysize.proof.miniature import prove_on_miniature, smallest_sizes
from anysize.proof.replan import require_unedited
from anysize.recipe import Options, Plan
from anysize.shrink import FROM_DATA
from tests import tiny
from tests.shrink.test_fit import logits_of

ONE_OF_EACH = [v for v in tiny.VARIANTS if str(v) in ("mixtral-GQA-untied", "olmoe-MHA-tied", "qwen3_moe-MQA-tied")]
BLOCK = "model.layers.{}.block_sparse_moe"
TOKENS = 2048


@pytest.fixture(scope="module")
def mixtral(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixtral of 5 experts, 2 a token, with the tokenizer of `llama`."""
    variant = next(v for v in tiny.VARIANTS if str(v) == "mixtral-GQA-untied")
    folder = tmp_path_factory.mktemp("source") / "tiny-mixtral"
    raw = {**tiny.config(variant), "vocab_size": 61}
    from anysize.proof.miniature import random_weights

    model = new_model("MixtralForCausalLM", raw, torch.float32)
    random_weights(model, 0)
    with quiet_transformers():
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((llama / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def scores(mixtral: Path, text: Path) -> Scores:
    return anysize.calibrate(mixtral, text, sequence_length=64, tokens=TOKENS)


def model_of(folder: Path) -> Any:
    source = Checkpoint(folder)
    state = {name: source.read(name) for name in source.tensors}
    return build_model("MixtralForCausalLM", source.config, state, torch.float32)


def batch_of(folder: Path, text: Path) -> torch.Tensor:
    from anysize.calibration.data import DataOptions, token_batches, tokenizer_of

    options = DataOptions(sequence_length=64, tokens=TOKENS)
    return torch.cat([b["input_ids"] for b in token_batches(str(text), tokenizer_of(str(folder)), 61, options)])


def test_the_router_gives_each_expert_its_score(mixtral: Path, text: Path, scores: Scores) -> None:
    with torch.no_grad():
        out = model_of(mixtral).model(batch_of(mixtral, text), output_router_logits=True)
    for layer, logits in enumerate(out.router_logits):
        weights, chosen = logits.softmax(-1).topk(2)
        weights = weights / weights.sum(-1, keepdim=True)
        wanted = torch.zeros(5).index_add_(0, chosen.flatten(), weights.flatten()) / len(logits)
        name = f"{BLOCK.format(layer)}.gate:route"
        assert scores.of(name, "abs").allclose(wanted.double(), atol=1e-5)
        assert scores.of(name, "abs").sum().item() == pytest.approx(1.0, abs=1e-5)


def test_what_each_expert_makes_of_its_tokens_is_seen(mixtral: Path, text: Path, scores: Scores) -> None:
    """Held against the matrices on disk, with the tokens that the router sends to the expert."""
    source, seen = Checkpoint(mixtral), {}
    model = model_of(mixtral)
    block = model.model.layers[1].mlp
    block.register_forward_hook(lambda _m, args, out: seen.update(read=args[0].flatten(0, 1), wrote=out))
    with torch.no_grad():
        model.model(batch_of(mixtral, text))
        _, _, chosen = block.gate(seen["read"])
    for expert in range(5):
        name = f"{BLOCK.format(1)}.experts.{expert}"
        w1, w3 = (source.read(f"{name}.{w}.weight") for w in ("w1", "w3"))
        read = seen["read"][(chosen == expert).any(-1)]
        inner = torch.nn.functional.silu(read @ w1.T) * (read @ w3.T)
        assert scores.of(f"{name}.w2:in", "abs").allclose(inner.abs().mean(0).double(), rtol=1e-4)
        second = (inner.T @ inner / len(inner)).double()
        assert scores.of(f"{name}.w2:in", "second").allclose(second, rtol=1e-3, atol=1e-6)
        assert scores.record.feeds[scores.record.aliases[f"{name}.w1:in"]].endswith("post_attention_layernorm")
        assert scores.of(f"{name}.w2:out", "abs").allclose(seen["wrote"].abs().mean((0, 1)).double(), rtol=1e-4)


def test_watching_experts_changes_nothing(mixtral: Path) -> None:
    model, ids, seen = model_of(mixtral), torch.arange(3, 40)[None], set[int]()
    with torch.no_grad():
        before = model(ids).logits
        with watched(model, lambda _m, expert, _x: seen.add(expert)):
            inside = model(ids).logits
        after = model(ids).logits
    assert seen == set(range(5))
    assert inside.allclose(before, atol=1e-6)
    assert after.equal(before)
    assert model.get_experts_implementation() == {"": "eager"}


def test_weights_left_on_disk_give_the_same_scores(mixtral: Path, text: Path, scores: Scores) -> None:
    low = anysize.calibrate(mixtral, text, sequence_length=64, tokens=TOKENS, low_memory=True)
    name = f"{BLOCK.format(1)}.experts.2.w2:in"
    assert low.of(name, "second").allclose(scores.of(name, "second"))
    assert low.sites.keys() == scores.sites.keys()


def test_the_experts_that_the_router_chooses_most_are_kept(mixtral: Path, scores: Scores) -> None:
    plan = anysize.plan(mixtral, num_experts=3, preset="subcloning", calibration=scores)
    source, made = Checkpoint(mixtral), target_tensors(plan, Checkpoint(mixtral))
    for layer in range(2):
        best = scores.of(f"{BLOCK.format(layer)}.gate:route", "abs").argsort(descending=True)[:3].sort().values
        assert plan.axes[f"expert.{layer}"].index.tolist() == best.tolist()
        router = f"{BLOCK.format(layer)}.gate.weight"
        assert made[router].equal(source.read(router)[best])
        for target, expert in enumerate(best.tolist()):
            for part in ("w1", "w2", "w3"):
                name = f"{BLOCK.format(layer)}.experts.{{}}.{part}.weight"
                assert made[name.format(target)].equal(source.read(name.format(expert)))
    assert plan.target_config["num_local_experts"] == 3
    assert plan.target_config["num_experts_per_tok"] == 2
    assert len(plan.dropped) == 2 * 2 * 3
    assert set(plan.dropped.values()) == {"its expert is not kept"}


def test_every_score_keeps_other_experts_or_neurons(mixtral: Path, scores: Scores) -> None:
    found: dict[str, Any] = {}
    for rule in ("activation", "rms", "minitron", "weight", "random", "first", "stride"):
        sizes = {"num_experts": 3, "intermediate_size": 7}
        read = scores if rule in FROM_DATA else None
        plan = anysize.plan(mixtral, select=rule, readers="none", calibration=read, **sizes)
        found[rule] = {axis: axis_map.runs for axis, axis_map in plan.axes.items()}
    rules = list(found)
    assert not [(a, b) for i, a in enumerate(rules) for b in rules[:i] if found[a] == found[b]]


def test_an_expert_weighs_what_all_its_matrices_and_its_router_row_weigh(mixtral: Path) -> None:
    plan = anysize.plan(mixtral, select="weight", readers="none", num_experts=2)
    source = Checkpoint(mixtral)
    norms = source.read(f"{BLOCK.format(1)}.gate.weight").square().sum(1)
    for expert in range(5):
        parts = (source.read(f"{BLOCK.format(1)}.experts.{expert}.{w}.weight") for w in ("w1", "w2", "w3"))
        norms[expert] += sum(part.square().sum() for part in parts)
    assert plan.axes["expert.1"].index.tolist() == norms.argsort(descending=True)[:2].sort().values.tolist()


def test_neurons_are_chosen_and_read_expert_by_expert(mixtral: Path, scores: Scores) -> None:
    plan = anysize.plan(
        mixtral, num_experts=3, intermediate_size=9, select="activation", readers="least-squares", calibration=scores
    )
    source, made = Checkpoint(mixtral), target_tensors(plan, Checkpoint(mixtral))
    choices = set[tuple[int, ...]]()
    for target, expert in enumerate(plan.axes["expert.1"].index.tolist()):
        old, new = (f"{BLOCK.format(1)}.experts.{number}" for number in (expert, target))
        best = scores.of(f"{old}.w2:in", "abs").argsort(descending=True)[:9].sort().values
        choices.add(tuple(best.tolist()))
        assert made[f"{new}.w1.weight"].equal(source.read(f"{old}.w1.weight")[best])
        second = scores.of(f"{old}.w2:in", "second")
        reader = least_squares(second[:, best], second[best][:, best])
        wanted = source.read(f"{old}.w2.weight").double() @ reader
        assert made[f"{new}.w2.weight"].double().allclose(wanted, atol=1e-5)
    assert len(choices) == 3


def test_directions_and_readers_go_to_every_expert_and_the_router(mixtral: Path, scores: Scores) -> None:
    plan = anysize.plan(mixtral, hidden_size=12, calibration=scores)
    assert (plan.options.preset, plan.options.readers) == ("subspace", "least-squares")
    assert any("each expert reads only the tokens that are routed to it" in note for note in plan.notes)
    readers = {
        r.reader for r in plan.recipes if r.layer is None and ".1.block_sparse_moe." in r.name and "w2" not in r.name
    }
    assert readers == {"model.layers.1.post_attention_layernorm:read"}
    assert all(r.writer == "hidden" for r in plan.recipes if r.name.endswith("w2.weight"))
    with pytest.raises(SizeError, match="each expert reads only the tokens that are routed to it: use least-squares"):
        anysize.plan(mixtral, hidden_size=12, readers="sequential", calibration=scores)


def test_an_expert_that_no_token_reached_is_told_and_read_as_it_is(mixtral: Path, scores: Scores) -> None:
    name = f"{BLOCK.format(0)}.experts.0.w2:in"
    nothing = {kind: torch.zeros_like(values) for kind, values in scores.sites[name].items()}
    unseen = replace(scores, sites={**scores.sites, name: nothing})
    for readers in ("least-squares", "measured"):
        plan = anysize.plan(mixtral, intermediate_size=9, select="rms", readers=readers, calibration=unseen)
        assert "no calibration token was routed to 1 of 10 experts" in plan.notes[0]
        down = f"{BLOCK.format(0)}.experts.0.w2.weight"
        assert target_tensors(plan, Checkpoint(mixtral))[down].equal(Checkpoint(mixtral).read(down)[:, :9])
    assert not anysize.plan(mixtral, intermediate_size=9, calibration=scores, select="rms", readers="none").notes


def test_an_expert_that_few_tokens_reached_is_told_and_read_as_it_is(mixtral: Path, scores: Scores) -> None:
    name, kept = f"{BLOCK.format(0)}.experts.0.w2:in", 9
    down = f"{BLOCK.format(0)}.experts.0.w2.weight"

    def read(samples: int) -> tuple[list[str], torch.Tensor]:
        seen = {**scores.sites[name], "samples": torch.tensor([float(samples)])}
        few = replace(scores, sites={**scores.sites, name: seen})
        plan = anysize.plan(mixtral, intermediate_size=kept, select="rms", readers="least-squares", calibration=few)
        return list(plan.notes), target_tensors(plan, Checkpoint(mixtral))[down]

    enough, fitted = read(kept + 1)
    few, unfitted = read(kept)
    (note,) = set(few) - set(enough)
    assert note == (
        "no more calibration tokens than the 9 neurons they keep were routed to 1 of 10 experts: what reads these is "
        "not fitted; calibrate with more tokens"
    )
    # As it is: whole columns of the source's.
    columns = Checkpoint(mixtral).read(down).T
    assert all(any(column.equal(own) for own in columns) for column in unfitted.T)
    assert not any(any(column.equal(own) for own in columns) for column in fitted.T)

    few_chosen = replace(scores, sites={**scores.sites, name: {**scores.sites[name], "samples": torch.tensor([9.0])}})
    chosen = anysize.plan(mixtral, intermediate_size=kept, select="refit", readers="none", calibration=few_chosen)
    assert any("1 of 10 experts: which of their neurons stay is little more than a guess; " in n for n in chosen.notes)


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"num_experts": 1}, "the router chooses num_experts_per_tok experts .*; nearest legal num_experts: 2 or 3"),
        ({"num_experts": 10}, "expert 5 -> 10: copies of an expert would take .*; nearest legal num_experts: 5"),
        ({"num_experts": 6}, "expert 5 -> 6: copies of an expert"),
    ],
)  # fmt: skip
def test_what_the_router_cannot_do_is_refused(mixtral: Path, sizes: dict[str, int], why: str) -> None:
    with pytest.raises(SizeError, match=why):
        anysize.plan(mixtral, **sizes)


def cut_plan(source: NamedTensors, **sizes: int) -> Plan:
    return make_plan(source, sizes, Options(select="first", readers="none"))


@pytest.mark.parametrize("variant", ONE_OF_EACH, ids=str)
def test_cut_experts_are_as_if_no_token_were_routed_to_them(variant: tiny.Variant) -> None:
    source = tiny.source(variant)
    checks = check_cuts(cut_plan(source, num_experts=3), source, logits_of(variant))
    assert [check.name for check in checks] == ["cut expert"]
    assert checks[0].passed, checks[0]
    assert checks[0].control is not None
    assert checks[0].control > 1e-2


@pytest.mark.parametrize("variant", ONE_OF_EACH, ids=str)
def test_permuting_experts_changes_nothing_and_permuting_them_without_the_router_does(variant: tiny.Variant) -> None:
    proof = prove_on_miniature(make_plan(tiny.source(variant), {"intermediate_size": 31}, Options()))
    check = next(c for c in proof.checks if c.name == "permute expert")
    assert check.passed, check
    assert check.control is not None
    assert check.control > 1e-2


def test_the_miniature_of_many_experts_has_few() -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == "qwen3_moe")
    raw = {**tiny.config(variant), "num_local_experts": 128, "num_experts_per_tok": 8}
    sizes = understand(raw).sizes
    assert smallest_sizes(understand(raw), sizes).source["expert"] == 10


def test_the_older_spelling_of_a_key_is_understood_and_dense_layers_are_refused() -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == "qwen3_moe")
    source = tiny.source(variant)
    older = {("num_experts" if key == "num_local_experts" else key): value for key, value in source.config.items()}
    assert understand(older).sizes == understand(source.config).sizes
    tensors = {name: source.read(name) for name in source.tensors}
    plan = cut_plan(NamedTensors(older, tensors), num_experts=3)
    assert plan.target_config["num_local_experts"] == 3
    assert "num_experts" not in plan.target_config
    for change in ({"mlp_only_layers": [0]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ArchitectureError, match="dense layers among those of experts"):
            understand({**source.config, **change})


def swapped(plan: Plan) -> Plan:
    """The plan with two experts' matrices in each other's place."""
    names = [f"{BLOCK.format(0)}.experts.{expert}.w2.weight" for expert in (0, 1)]
    sources = {r.name: r.source for r in plan.recipes if r.name in names}
    other = dict(zip(names, reversed(names), strict=True))
    recipes = [r.model_copy(update={"source": sources[other[r.name]]}) if r.name in other else r for r in plan.recipes]
    return plan.model_copy(update={"recipes": tuple(recipes)})


def test_a_plan_whose_experts_changed_places_is_refused(mixtral: Path, scores: Scores) -> None:
    source = Checkpoint(mixtral)
    for sizes in ({"num_experts": 3}, {"hidden_size": 36}):
        plan = anysize.plan(mixtral, calibration=scores if "num_experts" in sizes else None, **sizes)
        require_unedited(plan, source)
        account(swapped(plan), source)
        with pytest.raises(
            ProofError, match=r"source of model\.layers\.0\.block_sparse_moe\.experts\.0\.w2\.weight is"
        ):
            require_unedited(swapped(plan), source)


def test_a_model_in_memory_loses_experts_and_is_left_as_it_was(mixtral: Path, text: Path) -> None:
    model = model_of(mixtral)
    model.set_experts_implementation("batched_mm")
    scores = anysize.calibrate(model, text, tokenizer=str(mixtral), sequence_length=64, tokens=TOKENS)
    made: Any = anysize.resize(model, num_experts=3, preset="subcloning", calibration=scores)
    assert made.config.num_local_experts == 3
    assert made.model.layers[0].mlp.experts.gate_up_proj.shape[0] == 3
    assert model.get_experts_implementation() == {"": "batched_mm"}
    assert made(torch.arange(3, 20)[None]).logits.isfinite().all()


ODD: list[tuple[dict[str, Any], str]] = [
    ({"intermediate_size": 30}, "intermediate_size 28 or 32 needs nothing"),
    ({"hidden_size": 18}, "hidden_size 16 or 20 needs nothing"),
    ({"intermediate_size": 33}, "intermediate_size 32 or 36 needs nothing"),
    ({"intermediate_size": 20, "dtype": "bfloat16"}, "intermediate_size 16 or 24 needs nothing"),
    (
        {"intermediate_size": 30, "hidden_size": 18},
        "hidden_size 16 or 20 with intermediate_size 28 or 32 needs nothing",
    ),
]


@pytest.mark.parametrize(("sizes", "told"), ODD)
def test_experts_that_plain_transformers_cannot_run_are_told_of(
    tmp_path: Path, sizes: dict[str, Any], told: str
) -> None:
    from transformers import AutoModelForCausalLM

    raw = {**tiny.config(ONE_OF_EACH[0]), "intermediate_size": 32}
    with quiet_transformers():
        new_model("MixtralForCausalLM", raw, torch.float32).save_pretrained(tmp_path / "source")
    plan = anysize.plan(tmp_path / "source", **sizes)
    (note,) = (note for note in plan.notes if "experts" in note)
    assert note.endswith(f'model.set_experts_implementation("eager") runs it, and {told}')
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(anysize.apply(plan, tmp_path / "out"))
    with pytest.raises(RuntimeError, match="strides should be multiple of 16 bytes"):
        model(torch.arange(8)[None])
    model.set_experts_implementation("eager")
    assert model(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.parametrize("sizes", [{"intermediate_size": 28}, {"hidden_size": 20}, {"num_experts": 3}])
def test_experts_that_plain_transformers_runs_need_no_note(tmp_path: Path, sizes: dict[str, int]) -> None:
    raw = {**tiny.config(ONE_OF_EACH[0]), "intermediate_size": 32}
    with quiet_transformers():
        new_model("MixtralForCausalLM", raw, torch.float32).save_pretrained(tmp_path / "source")
    assert not any("rows" in note for note in anysize.plan(tmp_path / "source", **sizes).notes)


def test_of_experts_whose_rows_were_odd_before_nothing_is_told(mixtral: Path) -> None:
    assert not any("rows" in note for note in anysize.plan(mixtral, intermediate_size=30).notes)


def test_a_folder_of_fewer_experts_is_written_proved_and_loaded(
    mixtral: Path, text: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM

    sizes = ("--num-experts", 3, "--intermediate-size", 16, "--hidden-size", 16, "--num-hidden-layers", 1)
    ran = cli("resize", mixtral, tmp_path / "out", *sizes, "--calibration", text, "--verify", "full")
    assert ran.code == 0, ran.err
    assert "cut expert" in ran.out
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_local_experts == 3
    assert model(torch.arange(3, 20)[None]).logits.isfinite().all()
    assert anysize.verify(mixtral, tmp_path / "out").passed
