"""What is summed at a site: averages over all tokens, halves of second moments, and sequences told apart."""

from __future__ import annotations

import pytest
import torch

from anysize.calibration.run import Collector, normalized
from anysize.calibration.sites import sites
from anysize.calibration.statistics import BlockSums, SiteSums, averages
from anysize.config import understand
from tests import tiny


def test_averages_are_those_of_all_tokens_at_once() -> None:
    x = torch.randn(4, 7, 5, generator=torch.Generator().manual_seed(0))
    sums = SiteSums(5, second=True)
    for part in x.split(1):
        sums.add(part)
    found, flat = averages(sums.as_tensors()), x.reshape(-1, 5).double()
    assert found["abs"].allclose(flat.abs().mean(0), rtol=1e-6)
    assert found["rms"].allclose(flat.square().mean(0).sqrt(), rtol=1e-6)
    assert found["mean"].allclose(flat.mean(0), rtol=1e-5, atol=1e-6)
    assert found["second"].allclose(flat.T @ flat / 28, rtol=1e-5, atol=1e-6)
    assert found["minitron"].allclose(x.double().abs().mean(1).square().sum(0).sqrt(), rtol=1e-6)


def test_a_norm_that_keeps_no_number_is_seen_with_its_own() -> None:
    from transformers.models.olmo.modeling_olmo import OlmoLayerNorm

    # So small that the number decides.
    small, norm = 1e-3 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0)), OlmoLayerNorm(16)
    assert torch.allclose(normalized(norm, small, "layer"), norm(small), rtol=1e-4)


@pytest.mark.parametrize("size", [1, 511, 777])
def test_second_moments_are_whole_though_half_of_them_is_computed(size: int) -> None:
    sums, generator = SiteSums(size, second=True), torch.Generator().manual_seed(size)
    total = torch.zeros(size, size, dtype=torch.float64)
    for _ in range(3):
        values = torch.randn(2, 5, size, generator=generator)
        sums.add(values)
        total += values.double().flatten(0, 1).T @ values.double().flatten(0, 1)
        # What is asked for on the way, to be kept against a kill, changes nothing later.
        found = sums.as_tensors()["second"]
        assert torch.allclose(found, total, atol=1e-4)
        assert torch.equal(found, found.T)


def test_second_moments_may_see_fewer_tokens() -> None:
    x = torch.randn(1, 8, 3, generator=torch.Generator().manual_seed(0))
    sums = SiteSums(3, second=True)
    sums.add(x, stride=2)
    seen = x[0, ::2].double()
    assert averages(sums.as_tensors())["second"].allclose(seen.T @ seen / 4, rtol=1e-5)


@pytest.mark.parametrize(("stride", "length"), [(2, 8), (3, 9), (3, 8), (4, 4)])
def test_second_moments_of_fewer_tokens_see_every_position_as_often(stride: int, length: int) -> None:
    # A token is its position: what is on the diagonal is how often that was seen.
    x = torch.eye(length).expand(4 * stride, length, length)
    sums = SiteSums(length, second=True)
    sums.add(x, stride=stride)
    assert sums.as_tensors()["second"].diagonal().tolist() == [4.0] * length
    # What comes to one expert has no sequences.
    routed = SiteSums(length, second=True)
    routed.add(torch.eye(length), stride=stride)
    assert routed.as_tensors()["second"].diagonal().tolist() == [float(i % stride == 0) for i in range(length)]
    routed.add(torch.zeros(0, length), stride=stride)


@pytest.mark.parametrize("name", ["opt-untied", "mixtral-GQA-untied", "olmoe-MHA-tied"])
def test_sequences_are_told_apart_by_modules_that_see_all_tokens_in_one(name: str) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == name)
    model, config = tiny.model(variant), understand(tiny.config(variant))
    ids = torch.randint(0, tiny.VOCAB, (6, 13), generator=torch.Generator().manual_seed(2))

    def seen(batches: list[torch.Tensor]) -> dict[str, SiteSums]:
        collector = Collector(model, config, second_moments=False)
        with collector.attached():
            collector.run([{"input_ids": batch} for batch in batches], lambda _items: None)
        return collector.sums

    together, one_by_one = seen([ids]), seen(list(ids.split(1)))
    # What an expert reads are the tokens that are routed to it, of whichever sequence.
    every = {name: site for name, site in sites(config).items() if site.expert is None or "hidden" in site.dim.axes}
    compared = every.keys() & together.keys()
    assert len(compared) > 8
    for site in compared:
        assert (together[site].tokens, together[site].sequences) == (78, 6), site
        assert together[site].sums["minitron"].allclose(one_by_one[site].sums["minitron"], rtol=1e-5), site


def test_layers_are_scored_in_single_precision_whatever_a_model_runs_in() -> None:
    generator = torch.Generator().manual_seed(0)
    half = [torch.randn(3, 40, 64, generator=generator).bfloat16()]
    # So small a change that its cosine is 1 in half precision.
    half.append(half[0] * 1.01)
    whole = [values.double() for values in half]
    found = BlockSums(1)
    for _ in range(4):
        found.add(half)
    cosine = torch.nn.functional.cosine_similarity(*whole, dim=-1)
    sizes = (whole[1] - whole[0]).norm(dim=-1) / whole[1].norm(dim=-1)
    assert float(found.influence[0]) == pytest.approx(4 * float((1 - cosine).sum()), rel=1e-2)
    assert float(found.magnitude[0]) == pytest.approx(4 * float(sizes.sum()), rel=1e-5)
