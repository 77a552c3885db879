"""Shares add up without rounding, noise cancels, streams depend on nothing but their key."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anysize.split import normal, paired_noise, random_shares, rms, stream

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
VALUES = st.lists(
    st.floats(-3.0, 3.0, width=16) | st.sampled_from([0.0, -0.0, 1e-38, -1e-40, 5e-324, 6e-8, 1e30]),
    min_size=1,
    max_size=50,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(VALUES, st.integers(2, 5), st.integers(0, 2**31))
def test_shares_add_up_bit_by_bit(dtype: torch.dtype, values: list[float], num_copies: int, seed: int) -> None:
    whole = torch.tensor(values, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    shares = random_shares(whole, num_copies, stream(seed, "w", 0))
    assert len(shares) == num_copies
    # Adding in double precision, last share first, is how they were taken away.
    total = torch.zeros_like(whole)
    for share in reversed(shares):
        total = total + share
    assert torch.equal(total, whole)


@pytest.mark.parametrize("num_copies", [2, 3, 4])
def test_shares_are_uniform_on_the_simplex(num_copies: int) -> None:
    shares = torch.stack(random_shares(torch.ones(40_000), num_copies, stream(0, "w", 0)))
    assert (shares >= 0).all()
    means, variance = shares.mean(1), shares.var(1)
    expected = (num_copies - 1) / (num_copies**2 * (num_copies + 1))
    assert torch.allclose(means, torch.full((num_copies,), 1 / num_copies), atol=0.01)
    assert torch.allclose(variance, torch.full((num_copies,), expected), rtol=0.05)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_share_is_all_or_nothing(dtype: torch.dtype) -> None:
    # A share of exactly 1 leaves its twin at 0, which no gradient reaches where its partner is 0 as well.
    whole = (1 + torch.arange(200_000) % 128 / 128).to(dtype)
    shares = torch.stack(random_shares(whole, 2, stream(0, "w", 0)))
    assert (shares > 0).all()
    assert (shares < whole).all()


def test_a_stream_depends_on_seed_name_and_block_and_on_nothing_else() -> None:
    def draw(seed: int, name: str, block: int) -> list[int]:
        return stream(seed, name, block).integers(0, 2**63, 4).tolist()

    keys = [(0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1)]
    drawn = [draw(*key) for key in keys]
    assert drawn == [draw(*key) for key in keys]
    assert len({tuple(values) for values in drawn}) == len(keys)


def test_streams_are_those_of_every_earlier_version() -> None:
    # A plan replays to the same bytes only as long as these stay.
    assert stream(7, "model.norm.weight", 3).integers(0, 2**32, 3).tolist() == [3997506598, 1554719336, 2045281971]


@pytest.mark.parametrize("num_copies", [2, 3, 4, 5])
def test_noise_comes_in_pairs_of_opposite_sign(num_copies: int) -> None:
    clean = [
        torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(num_copies)
    ]
    noisy = paired_noise(clean, 0.5, stream(0, "w", 0))
    assert torch.allclose(sum(noisy), sum(clean), atol=1e-12)
    changed = [not torch.equal(a, b) for a, b in zip(clean, noisy, strict=True)]
    assert changed == [copy < num_copies - num_copies % 2 for copy in range(num_copies)]


@pytest.mark.parametrize("decibel", [3.0, 10.0, 20.0])
def test_noise_has_the_signal_to_noise_ratio_asked_for(decibel: float) -> None:
    signal = normal((300, 300), 0.3, torch.float64, stream(0, "signal", 0))
    std = rms(signal) * 10 ** (-decibel / 20)
    noise = paired_noise([signal, signal], std, stream(0, "w", 0))[0] - signal
    measured = 20 * np.log10(float(signal.square().mean().sqrt() / noise.square().mean().sqrt()))
    assert abs(measured - decibel) < 0.1


def test_normal_values_are_normal() -> None:
    values = normal((200_000,), 2.0, torch.float64, stream(0, "w", 0)) / 2.0
    moments = [float(values.pow(k).mean()) for k in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.03)
    assert values.abs().max() < 4.4


def test_rms_does_not_depend_on_how_the_sum_is_cut() -> None:
    values = normal((3, 700_001), 1.0, torch.float32, stream(0, "w", 0))
    assert rms(values) == rms(values.reshape(-1)) == pytest.approx(float(values.square().mean().sqrt()), rel=1e-5)
