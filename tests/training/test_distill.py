"""Distillation: the divergence is the textbook's, its top-k form is never more, and a teacher's twin learns nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import anysize
from anysize.errors import InputError
from anysize.proof.parity import load
from anysize.training.config import Distill, train_config
from anysize.training.distill import distilled, kl_divergence, kl_of_top, stream_distance, top_targets
from anysize.training.stream import stream_writer, streams_in_common
from anysize.training.targets import TargetCache

SEEDS = st.integers(0, 10_000)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.floats(0.5, 4))
def test_the_divergence_is_the_sum_over_classes(seed: int, temperature: float) -> None:
    p, q = logits(seed, 5, 7), logits(seed + 1, 5, 7)
    ps, qs = (p.double() / temperature).softmax(-1), (q.double() / temperature).softmax(-1)
    wanted = (ps * (ps / qs).log()).sum(-1).mean()
    assert kl_divergence(p, q, temperature).double() == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)


@given(SEEDS, st.integers(1, 9), st.floats(0.5, 4))
def test_top_k_is_never_more_than_all_and_equals_it_where_k_is_all(seed: int, k: int, temperature: float) -> None:
    teacher, student = logits(seed, 4, 9), logits(seed + 1, 4, 9)
    whole = float(kl_divergence(teacher, student, temperature))
    found = float(kl_of_top(*top_targets(teacher, k, temperature), student, temperature))
    assert -1e-5 <= found <= whole + 1e-5
    if k == 9:
        assert found == pytest.approx(whole, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("k", [None, 3])
def test_a_twin_of_its_teacher_has_no_loss_and_no_gradient(k: int | None) -> None:
    teacher = logits(0, 6, 11)
    for student, none in ((teacher.clone(), True), (logits(1, 6, 11), False)):
        student.requires_grad_()
        top = top_targets(teacher, k or 1, 2.0)
        kl = kl_divergence(teacher, student, 2.0) if k is None else kl_of_top(*top, student, 2.0)
        kl.backward()
        assert student.grad is not None
        assert (abs(float(kl.detach())) < 1e-6) is none
        assert (float(student.grad.abs().max()) < 1e-6) is none


@pytest.mark.parametrize("k", [None, 3])
def test_rows_that_are_looked_at_in_parts_give_the_same(monkeypatch: pytest.MonkeyPatch, k: int | None) -> None:
    teacher, found = logits(0, 3, 5, 11), []
    for largest in (1 << 24, 4 * 11):
        monkeypatch.setattr("anysize.training.distill._LARGEST", largest)
        student = logits(1, 3, 5, 11).requires_grad_()
        top = top_targets(teacher, k or 1, 2.0)
        kl = kl_divergence(teacher, student, 2.0) if k is None else kl_of_top(*top, student, 2.0)
        kl.backward()
        assert student.grad is not None
        found.append((kl.detach(), student.grad, *top))
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_part_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(largest: int) -> int:
        monkeypatch.setattr("anysize.training.distill._LARGEST", largest)
        held = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal held
            # What is a part of the logits themselves takes nothing.
            held += 0 if tensor.untyped_storage().data_ptr() in there else tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kl_divergence(teacher, student, 1.0)
        return held

    teacher, student = logits(0, 40, 11), logits(1, 40, 11).requires_grad_()
    there = {tensor.untyped_storage().data_ptr() for tensor in (teacher, student)}
    assert kept(1 << 24) >= 2 * student.numel()
    assert kept(4 * 11) < student.numel() / 2


def test_a_certain_teacher_leaves_nothing_for_the_rest() -> None:
    teacher = torch.tensor([[200.0, 0.0, 0.0, 0.0]])
    student = torch.zeros(1, 4, requires_grad=True)
    kl = kl_of_top(*top_targets(teacher, 2, 1.0), student, 1.0)
    kl.backward()
    assert float(kl.detach()) == pytest.approx(torch.log(torch.tensor(4.0)).item(), rel=1e-4)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_the_temperature_leaves_the_size_of_the_gradient() -> None:
    # For small logits the gradient of T^2 KL does not depend on T (Hinton et al. 2015, section 2.1).
    teacher, grads = 0.01 * logits(0, 1, 8), []
    for temperature in (1.0, 8.0):
        student = torch.zeros(1, 8, requires_grad=True)
        loss = distilled(torch.zeros(()), kl_divergence(teacher, student, temperature), 1.0, temperature)
        loss.backward()
        grads.append(student.grad)
    assert torch.allclose(grads[0], grads[1], rtol=0.05, atol=2e-4)


@pytest.mark.parametrize("preset", ["fresh", "hypercloning", "split"])
def test_right_after_growth_the_streams_are_one(llama: Path, preset: str) -> None:
    source = load(llama, "LlamaForCausalLM")
    plan = anysize.plan(llama, hidden_size=48, num_attention_heads=6, num_key_value_heads=3, preset=preset)
    target = anysize.apply(plan, verify="off")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        teacher = source(input_ids=ids, output_hidden_states=True).hidden_states
        student = target(input_ids=ids, output_hidden_states=True).hidden_states  # type: ignore[operator]
    writer = stream_writer(plan)
    for ours, theirs in zip(student[:-1], teacher[:-1], strict=True):
        assert float(stream_distance(ours, theirs, writer)) < 1e-9
        assert float(stream_distance(ours, theirs, writer.flip(0))) > 0.1


@pytest.mark.parametrize("layers", [3, 4, 5])
def test_right_after_growth_in_depth_the_streams_are_one(llama: Path, layers: int) -> None:
    source = load(llama, "LlamaForCausalLM")
    plan = anysize.plan(llama, num_hidden_layers=layers, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)
    target = anysize.apply(plan, verify="off")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        teacher = source(input_ids=ids, output_hidden_states=True).hidden_states
        student = target(input_ids=ids, output_hidden_states=True).hidden_states  # type: ignore[operator]
    writer, pairs = stream_writer(plan), streams_in_common(plan)
    # After the last layer of the source there is nothing to compare with.
    assert len(pairs) == layers - (1 if plan.layers[-1].silent else 0)
    distances = [float(stream_distance(student[layer], teacher[of], writer)) for layer, of in pairs]
    assert max(distances) < 1e-9
    by_source = [(i, step.source) for i, step in enumerate(plan.layers)]
    assert max(float(stream_distance(student[i], teacher[s], writer)) for i, s in by_source) > 0.01


def test_a_turned_stream_is_compared_with_its_source_turned(tied_llama: Path, tied_scores: object) -> None:
    source = load(tied_llama, "LlamaForCausalLM")
    plan = anysize.plan(tied_llama, hidden_size=16, num_attention_heads=2, num_key_value_heads=1, preset="subspace",
                        calibration=tied_scores)  # type: ignore[arg-type]  # fmt: skip
    target = anysize.apply(plan, verify="off")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        teacher = source(input_ids=ids, output_hidden_states=True).hidden_states[0]
        student = target(input_ids=ids, output_hidden_states=True).hidden_states[0]  # type: ignore[operator]
    writer = stream_writer(plan)
    assert writer.shape == (16, 32)
    assert float(stream_distance(student, teacher, writer)) < 1e-9
    assert float(stream_distance(student, teacher, writer.roll(1, 0))) > 0.1


def test_targets_are_computed_once_and_found_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def cache(identity: str = "teacher") -> TargetCache:
        return TargetCache(tmp_path, identity, num_sequences=4, length=5, k=3, num_classes=11)

    def compute() -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return top_targets(logits(0, 2, 5, 11), 3, 1.0)

    first = cache().of(torch.tensor([3, 1]), compute)
    again = cache().of(torch.tensor([1, 3]), compute)
    assert len(calls) == 1
    assert torch.equal(first[0], again[0].flip(0))
    assert torch.equal(first[1], again[1].flip(0))
    assert torch.equal(first[0], compute()[0])
    assert torch.allclose(first[1], compute()[1], rtol=1e-3)
    cache("another").of(torch.tensor([1, 3]), compute)
    assert len(calls) == 4


@pytest.mark.parametrize(("until", "taught"), [(None, 10), (0.5, 5), (0.01, 1), (1, 1), (4, 4), (40, 10)])
def test_a_teacher_is_heard_for_a_share_or_a_number_of_steps(until: float | None, taught: int) -> None:
    assert Distill(until_step=until).steps_taught(10) == taught


@pytest.mark.parametrize(
    ("until", "fading", "shares"),
    [
        (6, 0, [1, 1, 1, 1, 1, 1, 0, 0]),
        (6, 3, [1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]),
        (0.75, 0.375, [1, 1, 1, 1, 2 / 3, 1 / 3, 0, 0]),
        (None, 4, [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]),
        (0.5, 4, [1, 0.75, 0.5, 0.25, 0, 0, 0, 0]),
    ],
)
def test_a_teacher_may_fade_out(until: float | None, fading: float, shares: list[float]) -> None:
    options = Distill(until_step=until, fade_steps=fading)
    assert [options.share(step, 8) for step in range(8)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("distill", "told"),
    [
        ({"fade_steps": -1}, "greater than or equal to 0"),
        ({"weight": 0, "self_data": {}, "fade_steps": 2}, "fade_steps would do nothing"),
    ],
)
def test_what_cannot_fade_is_refused(distill: dict[str, object], told: str) -> None:
    raw = {"output": "o", "resize": {"source": "s"}, "data": {"train": "t"}, "distill": distill}
    with pytest.raises(InputError, match=told):
        train_config(raw, "c.yaml")


@pytest.mark.parametrize(("until", "fading"), [(4, 5), (0.4, 5), (0.4, 0.5), (None, 11)])
def test_what_fades_for_longer_than_it_is_heard_is_refused(until: float | None, fading: float) -> None:
    with pytest.raises(InputError, match=r"of 10 steps, and the teacher is listened to for"):
        Distill(until_step=until, fade_steps=fading).require_room(10)
    Distill(until_step=until, fade_steps=4).require_room(10)


@pytest.mark.parametrize("until", [1.0, 1.5, 0, -2, "soon"])
def test_what_is_no_number_of_steps_is_refused(until: object) -> None:
    raw = {"output": "o", "resize": {"source": "s"}, "data": {"train": "t"}, "distill": {"until_step": until}}
    with pytest.raises(InputError, match=r"until_step: (Input|1\.\d: wanted a whole number)"):
        train_config(raw, "c.yaml")
