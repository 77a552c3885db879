"""Weights are what the formula says: against a slow reference, in any order, and with every field of a recipe heard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from anysize.axis import AxisMap, extend, keep, tile
from anysize.errors import CheckpointError
from anysize.executor import DimMaps, TensorJob, is_finite
from anysize.recipe import Recipe
from anysize.tensors import shape_of

SIZES = {"hidden": 5, "ffn": 7, "kv": 2, "head": 3, "vocab": 11}
COPIES = {"hidden": tile(5, 15), "ffn": tile(7, 17), "kv": tile(2, 3), "head": keep(3), "vocab": keep(11)}
PADDED = {
    "hidden": extend(5, 13, copies=2),
    "ffn": extend(7, 9),
    "kv": extend(2, 3),
    "head": keep(3),
    "vocab": keep(11),
}


def recipe(arrow: str, axes: dict[str, AxisMap], **changes: Any) -> Recipe:
    from anysize.notation import parse

    shapes = [shape_of(parse(arrow), s) for s in (SIZES, {a: m.target_size for a, m in axes.items()})]
    fields: dict[str, Any] = {"source_dtype": "F32", "dtype": "F32", "fresh_std": 0.5, **changes}
    return Recipe(name="t", source="s", arrow=arrow, source_shape=shapes[0], shape=shapes[1], **fields)


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def made(
    wanted: Recipe, axes: dict[str, AxisMap], source: torch.Tensor, *, seed: int = 0, backwards: bool = False
) -> torch.Tensor:
    job = TensorJob(wanted, source, DimMaps(axes), seed)
    numbers = range(job.num_blocks)
    blocks = {i: job.block(i) for i in (reversed(numbers) if backwards else numbers)}
    return torch.cat([blocks[i] for i in numbers]).reshape(wanted.shape)


def matrices(text: str, axes: dict[str, AxisMap], *, writes: bool) -> np.ndarray:
    names = text.replace("(", " ").replace(")", " ").replace("norm", " ").split()
    product = np.eye(1)
    for name in names:
        product = np.kron(product, axes[name].write_matrix() if writes else axes[name].read_matrix())
    return product


@pytest.mark.parametrize("axes", [COPIES, PADDED], ids=["copies", "padded"])
@pytest.mark.parametrize(
    "text", ["norm(hidden) -> ffn", "ffn -> hidden", "norm(hidden) -> (kv head)", "(kv head) -> hidden"]
)
def test_equal_shares_are_the_matrix_product(axes: dict[str, AxisMap], text: str) -> None:
    reads, _, writes = text.partition(" -> ")
    source = weights(recipe(text, axes).source_shape)
    got = made(recipe(text, axes, share="equal", fresh_std=0.0, factor=1.25), axes, source).double().numpy()
    wanted = 1.25 * matrices(writes, axes, writes=True) @ source.double().numpy() @ matrices(reads, axes, writes=False)
    assert np.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("share", ["equal", "diagonal", "random"])
@pytest.mark.parametrize("noise", [None, 10.0])
@pytest.mark.parametrize("stored", ["", ", stored in x out"])
def test_whatever_the_shares_the_copies_add_up(share: str, noise: float | None, stored: str) -> None:
    text = f"ffn -> hidden{stored}"
    source = weights(recipe(text, COPIES).source_shape)
    got = made(recipe(text, COPIES, share=share, noise_db=noise), COPIES, source).double()
    got, plain = (got.T, source.T) if stored else (got, source)
    folded = got @ torch.from_numpy(COPIES["ffn"].write_matrix())
    assert torch.allclose(folded, torch.from_numpy(COPIES["hidden"].write_matrix()) @ plain.double(), atol=1e-6)


def test_diagonal_copies_read_one_copy_each() -> None:
    axes = {"hidden": tile(5, 10), "ffn": tile(7, 14)}
    source = weights((5, 7))
    got = made(recipe("ffn -> hidden", {**COPIES, **axes}, share="diagonal"), {**COPIES, **axes}, source)
    zero = torch.zeros_like(source)
    assert torch.equal(got, torch.cat([torch.cat([source, zero], 1), torch.cat([zero, source], 1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_random_shares_add_up_bit_by_bit_in_storage(dtype: torch.dtype) -> None:
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
    axes = {**COPIES, "ffn": tile(7, 14)}
    source = weights((5, 7), dtype)
    wanted = recipe("ffn -> hidden", axes, share="random", dtype=names[dtype], source_dtype=names[dtype])
    got = made(wanted, axes, source)
    assert got.dtype == dtype
    assert torch.equal(got[:, :7] + got[:, 7:], source.repeat(3, 1))


def test_blocks_do_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anysize.executor.rows_per_block", lambda _columns: 2)
    source = weights((5, 7))
    wanted = recipe("ffn -> hidden", PADDED, share="random", noise_db=10.0)
    assert torch.equal(made(wanted, PADDED, source), made(wanted, PADDED, source, backwards=True))


def test_means_fill_the_pad_of_a_writer_and_silence_its_fresh_readers() -> None:
    source = weights((5, 7))
    got = made(recipe("ffn -> hidden", PADDED, pad="mean"), PADDED, source)
    assert torch.allclose(got[10:, :7], source.mean(0, keepdim=True).expand(3, 7), atol=1e-6)
    assert (got[:, 7:] == 0).all()


def test_a_gain_stored_minus_one_is_scaled_as_a_gain() -> None:
    source = weights((5,))
    got = made(recipe("-> norm(hidden)", PADDED, factor=0.25, stored_as="1+w", pad="one"), PADDED, source)
    assert torch.allclose(got[:5], 0.25 * (1 + source) - 1)
    assert (got[10:] == 0).all()
    silent = made(recipe("-> hidden", PADDED, stored_as="1+w", silent=True), PADDED, source)
    assert (silent == -1).all()


BASE = {"factor": 1.0, "share": "random", "fresh_std": 0.5}
CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("ffn -> hidden", {"factor": 2.0}),
    ("ffn -> hidden", {"share": "equal"}),
    ("ffn -> hidden", {"share": "diagonal"}),
    ("ffn -> hidden", {"noise_db": 10.0, "share": "equal"}),
    ("ffn -> hidden", {"pad": "mean"}),
    ("ffn -> hidden", {"silent": True}),
    ("norm(hidden) -> ffn", {"fresh_std": 0.25}),
    ("norm(hidden) -> ffn", {"fresh_scale": 1.0}),
    ("-> norm(hidden)", {"stored_as": "1+w", "factor": 2.0}),
    ("-> norm(hidden)", {"pad": "one"}),
]


@pytest.mark.parametrize(("text", "change"), CHANGES, ids=lambda value: str(value))
def test_every_field_of_a_recipe_changes_the_weights(text: str, change: dict[str, Any]) -> None:
    axes = {**PADDED, "ffn": tile(7, 16)} if text.startswith("ffn") else PADDED
    source = weights(recipe(text, axes).source_shape)
    plain, changed = (made(recipe(text, axes, **{**BASE, **more}), axes, source) for more in ({}, change))
    assert not torch.equal(plain, changed)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fresh_values_are_as_large_as_the_sources(scale: float) -> None:
    axes = {**PADDED, "ffn": extend(7, 4000)}
    source = 3 * weights((7, 5))
    wanted = recipe("norm(hidden) -> ffn", axes, share="equal", factor=2.0, fresh_scale=scale)
    new = made(wanted, axes, source)[7:]
    assert float(new.square().mean().sqrt()) == pytest.approx(
        scale * 2 * float(source.square().mean().sqrt()), rel=0.02
    )
    # A tensor of zeros says nothing about size.
    nothing = made(wanted, axes, torch.zeros(7, 5))[7:]
    assert float(nothing.square().mean().sqrt()) == pytest.approx(0.5, rel=0.02)


def test_noise_levels_and_score_powers_change_the_weights() -> None:
    source = weights((5, 7))
    loud, quiet = (
        made(recipe("ffn -> hidden", COPIES, share="equal", noise_db=d), COPIES, source) for d in (3.0, 20.0)
    )
    assert not torch.equal(loud, quiet)
    axes = {**COPIES, "head": tile(3, 6)}
    queries = weights((6, 5))
    half, whole = (
        made(recipe("norm(hidden) -> (kv query(head))", axes, share="equal", score_power=p), axes, queries)
        for p in (0.25, 0.0)
    )
    assert not torch.equal(half, whole)


def test_the_seed_changes_what_is_random_and_nothing_else() -> None:
    source = weights((5, 7))
    random, equal = (recipe("ffn -> hidden", COPIES, share=share) for share in ("random", "equal"))
    assert not torch.equal(made(random, COPIES, source), made(random, COPIES, source, seed=1))
    assert torch.equal(made(equal, COPIES, source), made(equal, COPIES, source, seed=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_source_with_nan_or_inf_is_refused_unless_allowed(bad: float, dtype: torch.dtype) -> None:
    source = weights((5, 7), dtype)
    assert is_finite(source)
    source[3, 2] = bad
    assert not is_finite(source)
    wanted = recipe("ffn -> hidden", COPIES, share="equal")
    with pytest.raises(CheckpointError, match="tensor 's' holds NaN or Inf"):
        TensorJob(wanted, source, DimMaps(COPIES), 0)
    assert TensorJob(wanted, source, DimMaps(COPIES), 0, allow_nonfinite=True).num_blocks == 1
