"""What is kept is what costs least to lose: directions against every other subspace, removals against brute force."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from anysize.directions import directions, reading_metric
from anysize.removal import kept_blocks


def _draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _moments(seed: int, size: int) -> torch.Tensor:
    mixed = _draw(seed, size, size)
    return mixed @ mixed.T / size + 0.01 * torch.eye(size, dtype=torch.float64)


def _lost(metric: torch.Tensor, moments: torch.Tensor, write: torch.Tensor) -> float:
    """Return E |A x - S R x|^2 under the best S, with A^T A the metric."""
    cross = moments @ write.T
    rest = moments - cross @ torch.linalg.solve(write @ cross, cross.T)
    return float((metric * rest).sum())


@given(st.integers(3, 8), st.integers(1, 7), st.integers(0, 50))
def test_no_subspace_loses_less_of_what_is_read(size: int, kept: int, seed: int) -> None:
    kept = min(kept, size - 1)
    readers, moments = _draw(seed, 5, size), _moments(seed + 1, size)
    metric = readers.T @ readers
    write = directions(moments, kept, centred=False, metric=metric)
    least = _lost(metric, moments, write)
    assert (write @ write.T).allclose(torch.eye(kept, dtype=torch.float64))
    for other in (directions(moments, kept, centred=False), *(_draw(seed + i, kept, size) for i in range(2, 6))):
        assert least <= _lost(metric, moments, other) + 1e-9


def test_what_nobody_reads_goes_however_large_it_is() -> None:
    moments = torch.diag(torch.tensor([100.0, 1.0, 2.0], dtype=torch.float64))
    read = torch.diag(torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64))
    assert directions(moments, 2, centred=False, metric=read)[:, 0].abs().max() < 1e-12
    assert directions(moments, 2, centred=False)[:, 0].abs().max() > 0.99


@given(st.integers(0, 50))
def test_directions_under_layer_norm_add_up_to_zero(seed: int) -> None:
    centred = _draw(seed, 60, 8)
    centred = centred - centred.mean(1, keepdim=True)
    write = directions(centred.T @ centred, 4, centred=True, metric=_moments(seed, 8))
    assert (centred @ write.T).sum(1).abs().max() < 1e-9
    assert torch.linalg.svdvals(write)[:3].allclose(torch.ones(3, dtype=torch.float64))


def test_every_norm_counts_alike_and_the_head_as_much_as_all() -> None:
    eye = torch.eye(2, dtype=torch.float64)
    first, second = (torch.diag(torch.tensor(v, dtype=torch.float64)) for v in ([1000.0, 0.0], [0.0, 1.0]))
    metric = reading_metric([(n, g, eye) for n, g in (("a", first), ("b", second), ("head", second))], "head")
    assert metric.diagonal().tolist() == [0.5, 1.5]


def _error(weight: torch.Tensor, moments: torch.Tensor, channels: list[int]) -> float:
    """Return E |W x - W' x_K|^2 under the best W' that reads these channels only."""
    inside = moments[channels][:, channels]
    refitted = torch.linalg.solve(inside, moments[channels]).T
    rest = moments - refitted @ moments[channels]
    return float((weight @ rest * weight).sum())


@given(st.integers(3, 6), st.integers(1, 3), st.integers(0, 50))
def test_one_removal_is_the_cheapest_after_the_refit(blocks: int, width: int, seed: int) -> None:
    size = blocks * width
    weight, moments = _draw(seed, 4, size), _moments(seed + 1, size)
    channels = torch.arange(size).reshape(blocks, width)
    found = kept_blocks(weight, moments, channels, blocks - 1, ridge=0.0)
    errors = {
        kept: _error(weight, moments, channels[list(kept)].flatten().tolist())
        for kept in itertools.combinations(range(blocks), blocks - 1)
    }
    assert errors[tuple(found)] <= min(errors.values()) * (1 + 1e-6)


def test_of_two_that_say_the_same_one_goes_however_loud_they_are() -> None:
    x = _draw(0, 500, 4)
    x[:, 1] = x[:, 0] + 1e-3 * x[:, 1]
    x[:, :2] *= 10
    moments, weight = x.T @ x / len(x), torch.eye(4, dtype=torch.float64)
    kept = kept_blocks(weight, moments, torch.arange(4)[:, None], 3, ridge=1e-6)
    assert kept[-2:] == [2, 3], "a loud copy was kept, and something quiet that nothing else says went"


def test_many_go_in_rounds_and_the_right_number_stays() -> None:
    weight, moments = _draw(0, 3, 700), _moments(1, 700)
    kept = kept_blocks(weight, moments, torch.arange(700)[:, None], 100)
    assert len(kept) == 100
    assert kept == sorted(set(kept))
