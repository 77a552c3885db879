"""Which coordinates are kept: scores, ties, order, and the published formula on real tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anysize
from anysize.calibration.scores import Scores
from anysize.errors import SizeError
from anysize.executor import target_tensors
from anysize.io.reader import Checkpoint
from anysize.notation import parse
from anysize.select import best, reduced
from anysize.shrink import FROM_DATA

HALF = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def made(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    return target_tensors(anysize.plan(source, **options), Checkpoint(source))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_the_best_are_kept_in_order_and_ties_go_to_the_lower_index(scores: list[int], data: st.DataObject) -> None:
    size = data.draw(st.integers(1, len(scores)))
    kept = best(torch.tensor(scores, dtype=torch.float64), size).index.tolist()
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:size]
    assert kept == sorted(ranked)


def test_a_composed_dim_is_reduced_to_one_of_its_axes() -> None:
    dim, sizes = parse("-> (kv group head)").writes[0], {"kv": 2, "group": 3, "head": 4}
    values = torch.arange(24, dtype=torch.float64)
    cube = values.reshape(2, 3, 4)
    assert reduced(values, dim, sizes, "kv", root=False).equal(cube.mean((1, 2)))
    assert reduced(values, dim, sizes, "group", root=True).allclose(cube.square().sum((0, 2)).sqrt())


def test_a_concatenated_dim_is_reduced_over_all_its_blocks() -> None:
    dim, sizes = parse("-> (kv group) + kv").writes[0], {"kv": 2, "group": 2}
    values = torch.tensor([1.0, 3.0, 5.0, 7.0, 10.0, 20.0], dtype=torch.float64)
    assert reduced(values, dim, sizes, "kv", root=False).tolist() == [12.0, 26.0]


def test_subcloning_is_the_published_formula(llama: Path, scores: Scores) -> None:
    """Rows and columns by mean |activation|, sqrt(n/m) on every cut fan-in, norms as they are (2312.09299)."""
    found = made(llama, preset="subcloning", calibration=scores, **HALF)
    source = {name: Checkpoint(llama).read(name) for name in Checkpoint(llama).tensors}
    total = sum(
        scores.of(f"model.{name}:out", "abs")
        for name in (
            "embed_tokens",
            *(f"layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.o_proj", "mlp.down_proj")),
        )
    )
    hidden = best(total, 16).index
    gate = "model.layers.1.mlp.gate_proj.weight"
    ffn = best(scores.of("model.layers.1.mlp.down_proj:in", "abs"), 24).index
    assert found[gate].allclose(source[gate][ffn][:, hidden] * (32 / 16) ** 0.5)
    down = "model.layers.1.mlp.down_proj.weight"
    assert found[down].allclose(source[down][hidden][:, ffn] * (48 / 24) ** 0.5)
    heads = scores.of("model.layers.0.self_attn.o_proj:in", "abs").reshape(2, 2 * 8).mean(1)
    key = "model.layers.0.self_attn.k_proj.weight"
    kept = int(heads.argmax())
    assert found[key].allclose(source[key][kept * 8 : kept * 8 + 8][:, hidden] * 2**0.5)
    assert found["model.norm.weight"].equal(source["model.norm.weight"][hidden])
    assert found["model.embed_tokens.weight"].equal(source["model.embed_tokens.weight"][:, hidden])


def test_a_tied_head_takes_its_fan_in_through_the_final_gain(tied_llama: Path, tied_scores: Scores) -> None:
    found = made(tied_llama, preset="subcloning", calibration=tied_scores, hidden_size=16)
    plain = made(tied_llama, preset="subcloning", readers="none", calibration=tied_scores, hidden_size=16)
    name = "model.embed_tokens.weight"
    assert found[name].equal(plain[name])
    assert found["model.norm.weight"].allclose(plain["model.norm.weight"] * 2**0.5)


def test_weight_selection_takes_a_uniform_stride_and_the_first_layers(llama: Path) -> None:
    found = made(llama, preset="weight-selection", num_hidden_layers=1, **HALF)
    source = Checkpoint(llama)
    name = "model.layers.0.mlp.up_proj.weight"
    assert found[name].equal(source.read(name)[::2][:, ::2])
    assert not any(".layers.1." in key for key in found)


def test_every_score_keeps_something_else(llama: Path, scores: Scores) -> None:
    rules = ("activation", "rms", "minitron", "weight", "random", "first", "stride", "refit")
    found = {
        rule: made(llama, select=rule, readers="none", calibration=scores if rule in FROM_DATA else None, **HALF)
        for rule in rules
    }
    embeddings = [tensors["model.embed_tokens.weight"] for tensors in found.values()]
    same = [a.equal(b) for i, a in enumerate(embeddings) for b in embeddings[:i]]
    # rms may agree with the mean of |x| on so few coordinates; no other two rules may.
    assert sum(same) <= 1


def test_the_seed_chooses_what_random_keeps(llama: Path) -> None:
    one, again, other = (made(llama, select="random", seed=s, **HALF)["model.norm.weight"] for s in (0, 0, 1))
    assert one.equal(again)
    assert not one.equal(other)


def test_one_axis_grows_while_another_shrinks(llama: Path, scores: Scores) -> None:
    plain = made(llama, preset="subspace", readers="least-squares", calibration=scores, hidden_size=16)
    mixed = anysize.plan(llama, preset="subspace", calibration=scores, hidden_size=16, intermediate_size=64)
    assert "fresh" not in mixed.options.preset
    found = target_tensors(mixed, Checkpoint(llama))
    for name, tensor in plain.items():
        assert found[name][tuple(slice(0, size) for size in tensor.shape)].equal(tensor)
    down = found["model.layers.0.mlp.down_proj.weight"]
    assert down.shape == (16, 64)
    assert not down[:, 48:].any()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"preset": "subcloning", "hidden_size": 16}, "select 'activation' chooses by activations: pass --calibration"),
        ({"readers": "least-squares", "hidden_size": 16}, "readers 'least-squares' are fitted to activations"),
        ({"select": "principal", "readers": "none", "hidden_size": 16}, "principal directions are no selection"),
        ({"preset": "subcloning", "hidden_size": 64}, "preset 'subcloning' shrinks, and no size asked for is below"),
        ({"preset": "split", "hidden_size": 16}, "preset 'split' grows, and every size asked for is below"),
        ({"select": "first", "hidden_size": 64}, "select 'first': no width is below the source's"),
        ({"preset": "sublconing", "hidden_size": 16}, "unknown preset 'sublconing' (did you mean 'subcloning'?)"),
        ({"vocab_size": 50}, "vocab 61 -> 50: which tokens go cannot be told from a size"),
        ({"head_dim": 4}, "rotary positions turn pairs of channels"),
        ({"num_hidden_layers": 1, "layers": "block-influence"}, "'block-influence' needs the layers' scores"),
        ({"num_hidden_layers": 1, "layers": "stack"}, "'stack' adds layers; to drop some: middle"),
        ({"num_hidden_layers": 3, "layers": "middle"}, "'middle' drops layers; to add some: identity"),
        ({"hidden_size": 17}, "nearest legal hidden_size: 16 or 20"),
    ],
)
def test_what_cannot_be_cut_is_refused(llama: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(SizeError) as refusal:
        anysize.plan(llama, **options)
    assert why in str(refusal.value)


def test_scores_that_would_change_nothing_are_refused(llama: Path, scores: Scores) -> None:
    with pytest.raises(SizeError, match="no size asked for is below the source's"):
        anysize.plan(llama, hidden_size=64, calibration=scores)
