"""Layers found by evolution: the planted ones, by the right fitness only, within the budget, resumed to the same."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import anysize
from anysize.arch import table
from anysize.calibration import divergence
from anysize.calibration.divergence import Divergence
from anysize.calibration.evolution import Search, mutated, searched
from anysize.calibration.ledger import Candidate, Ledger
from anysize.errors import InputError, OutputError, SizeError
from anysize.executor import target_tensors
from anysize.io.models import build_model, config_of, new_model
from anysize.io.reader import Checkpoint
from anysize.proof.miniature import random_weights
from anysize.proof.parity import load
from anysize.recipe import Options
from tests import tiny

Run = Callable[..., Any]
BATCHES = (512,) * 9 + (256,)
LAYERS, KEPT = 16, 9
PLANTED = (0, 2, 3, 5, 8, 9, 12, 13, 15)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "search"


class Far:
    """A fitness with interactions and noise on every batch: how far a set is from the planted one."""

    def __init__(self, *, sign: float = 1.0, stop_after: int | None = None) -> None:
        self.calls: list[tuple[Candidate, int]] = []
        self.sign, self.left = sign, stop_after

    def __call__(self, candidates: Sequence[Candidate], batch: int) -> Iterator[float]:
        for candidate in candidates:
            if self.left == len(self.calls):
                raise KeyboardInterrupt
            self.calls.append((candidate, batch))
            missing = sorted(set(PLANTED) - set(candidate))
            near = sum(1 for a, b in itertools.pairwise(missing) if b - a < 3)
            noise = np.random.default_rng([batch, *candidate]).normal() * 0.3
            yield self.sign * (len(missing) + 0.7 * near) + noise


def evolved(far: Far, *, budget: int = 2_000_000, seed: int = 0, place: Path | None = None) -> tuple[Candidate, Ledger]:
    ledger = Ledger(far, BATCHES, place)
    first = [tuple(range(KEPT)), tuple(range(LAYERS - KEPT, LAYERS))]
    search = Search(LAYERS, KEPT, ledger, first, budget=budget, seed=seed)
    search.require_budget()
    return search.run(), ledger


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_layers_are_found_among_many(seed: int) -> None:
    best, ledger = evolved(Far(), seed=seed)
    assert best == PLANTED
    # There are 11,440 sets.
    assert ledger.candidates < 3000


@pytest.mark.parametrize("sign", [0.0, -1.0])
def test_a_wrong_fitness_does_not_find_them(sign: float) -> None:
    best, _ = evolved(Far(sign=sign))
    assert len(set(best) & set(PLANTED)) < KEPT - 1


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.integers(330_000, 900_000))
def test_the_budget_is_kept_and_nothing_is_measured_twice(seed: int, budget: int) -> None:
    far = Far()
    best, ledger = evolved(far, seed=seed, budget=budget)
    assert len(set(far.calls)) == len(far.calls)
    assert ledger.spent == sum(BATCHES[batch] for _, batch in far.calls) <= budget
    assert ledger.complete(best)
    every = range(len(BATCHES))
    complete = [c for c in {c for c, _ in far.calls} if ledger.complete(c)]
    assert {tuple(range(KEPT)), tuple(range(LAYERS - KEPT, LAYERS))} <= set(complete)
    assert ledger.mean(best, every) == min(ledger.mean(c, every) for c in complete)


def test_the_seed_decides_and_more_tokens_look_farther() -> None:
    runs = [Far() for _ in range(4)]
    for far, seed, budget in zip(runs, (0, 0, 1, 0), (400_000, 400_000, 400_000, 800_000), strict=True):
        evolved(far, seed=seed, budget=budget)
    assert runs[0].calls == runs[1].calls != runs[2].calls
    assert runs[3].calls[: len(runs[0].calls)] == runs[0].calls != runs[3].calls


def test_a_budget_below_two_generations_is_refused_with_what_it_takes() -> None:
    # Four batches at first, the others (3,072 tokens at most) for the two named sets and two survivors; then offspring.
    needed = 64 * 2048 + 4 * 3072 + 32 * 2048 + 2 * 3072
    far = Far()
    with pytest.raises(SizeError) as refusal:
        evolved(far, budget=needed - 1)
    assert far.calls == []
    assert str(refusal.value) == (
        f"search_tokens={needed - 1}: to search for 9 of 16 layers takes at least {needed} tokens on these data, one "
        "generation of offspring included"
    )
    _, ledger = evolved(far, budget=needed)
    # The first generation has 64 sets; offspring were measured after it.
    assert ledger.candidates > 64


def test_few_sets_are_all_measured() -> None:
    far = Far()
    ledger = Ledger(far, BATCHES)
    search = Search(5, 3, ledger, [(0, 1, 2)], budget=10 * sum(BATCHES), seed=0)
    search.require_budget()
    assert search.run() == (0, 2, 3)
    assert ledger.candidates == 10
    assert ledger.spent == search.total_tokens == 10 * sum(BATCHES)


@given(st.integers(2, 20), st.data())
def test_offspring_differ_by_one_to_three_switches(size: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, size - 1))
    parent = tuple(sorted(data.draw(st.permutations(range(size)))[:count]))
    child = mutated(parent, size, np.random.default_rng(data.draw(st.integers(0, 99))))
    assert list(child) == sorted(set(child))
    assert len(child) == count
    assert 1 <= len(set(child) - set(parent)) <= 3


@pytest.mark.parametrize("stop_after", [1, 77, 400])
def test_a_search_that_was_stopped_goes_on_to_the_same(tmp_path: Path, stop_after: int) -> None:
    whole, place = Far(), tmp_path / "state.jsonl"
    best, ledger = evolved(whole, budget=500_000)
    with pytest.raises(KeyboardInterrupt):
        evolved(Far(stop_after=stop_after), budget=500_000, place=place)
    # What a kill in the middle of a line leaves.
    place.write_text(place.read_text()[:-5])
    rest = Far()
    again, resumed = evolved(rest, budget=500_000, place=place)
    assert (again, resumed.spent, resumed.candidates) == (best, ledger.spent, ledger.candidates)
    assert len(rest.calls) == len(whole.calls) - stop_after + 1
    assert sorted(rest.calls) == sorted(set(whole.calls) - set(whole.calls[: stop_after - 1]))
    resumed.close()
    assert not place.exists()


def deep(folder: Path, new_llama: Run, silent: Sequence[int], *, layers: int) -> Path:
    """A llama in which some layers do nothing."""
    new_llama(folder, num_hidden_layers=layers)
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    for layer in silent:
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{part}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def kept(plan: Any) -> list[int]:
    return [step.source for step in plan.layers]


# 15 sets of 6 layers are all measured; of 12 layers there are 924.
PLANTS = {6: (1, 3), 12: (0, 3, 4, 7, 8, 10)}


@pytest.mark.parametrize("layers", PLANTS)
def test_layers_that_do_nothing_are_the_ones_dropped(
    new_llama: Run, text: Path, tmp_path: Path, cache: Path, layers: int
) -> None:
    source = deep(tmp_path / "source", new_llama, PLANTS[layers], layers=layers)
    scores = anysize.calibrate(source, text, sequence_length=64, second_moments=False)
    told: list[tuple[str, int, int]] = []
    count = layers - len(PLANTS[layers])
    options: dict[str, Any] = {"num_hidden_layers": count, "readers": "none"}
    wanted = [layer for layer in range(layers) if layer not in PLANTS[layers]]
    plan = anysize.plan(
        source,
        layers="evolutionary",
        calibration=scores,
        progress=lambda *a: told.append(a),
        search_tokens=400_000,
        **options,
    )
    assert kept(plan) == wanted
    assert plan.notes[0].startswith("layers evolutionary: KL 0.0000 nats from the source, the least of")
    assert "(block-influence 0.0000, " in plan.notes[0]
    assert plan.inexact == (f"layers evolutionary: the target runs layers {','.join(map(str, wanted))} of the source",)
    assert plan.options.layers == "evolutionary"
    assert {stage for stage, _, _ in told} == {"search"}
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})
    assert told[-1][1] <= told[-1][2] <= 400_000
    assert list(cache.iterdir()) == []
    # The same layers, taken from the plan, give the same bytes again and anywhere.
    replayed = target_tensors(anysize.Plan.from_json(plan.to_json()), Checkpoint(source))
    listed = target_tensors(anysize.plan(source, layers=",".join(map(str, wanted)), **options), Checkpoint(source))
    assert all(replayed[name].equal(tensor) for name, tensor in listed.items())


@pytest.mark.parametrize("wrong", [lambda p, q: 0.0, lambda p, q: -float((p - q).square().mean())])  # noqa: ARG005
def test_by_another_measure_they_are_not(
    new_llama: Run, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., float]
) -> None:
    source = deep(tmp_path / "source", new_llama, PLANTS[6], layers=6)
    scores = anysize.calibrate(source, text, sequence_length=64, second_moments=False)
    monkeypatch.setattr(divergence, "kl", wrong)
    plan = anysize.plan(source, num_hidden_layers=4, layers="evolutionary", calibration=scores)
    assert not set(kept(plan)).isdisjoint(PLANTS[6])


@pytest.fixture(scope="module")
def six(new_llama: Run, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A llama of six layers, none of them silent, and its scores."""
    source = deep(tmp_path_factory.mktemp("deep") / "source", new_llama, (), layers=6)
    return source, anysize.calibrate(source, text, sequence_length=64, second_moments=False)


def test_kl_is_that_of_the_definition() -> None:
    p, q = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 5, 7)
    wanted = torch.nn.functional.kl_div(
        q.log_softmax(-1).flatten(0, 1), p.log_softmax(-1).flatten(0, 1), reduction="batchmean", log_target=True
    )
    assert divergence.kl(p, q) == pytest.approx(float(wanted), rel=1e-5)
    assert divergence.kl(p, p) == 0


def test_the_source_runs_once_a_batch_and_is_left_as_it_was(six: tuple[Path, Any]) -> None:
    model = load(six[0], "LlamaForCausalLM")
    batches = [{"input_ids": torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]
    before = model(**batches[0]).logits
    runs: list[int] = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(0))
    measured = Divergence(lambda: model, anysize.config.understand(model.config.to_dict()), batches)
    without_the_first = [(1, 2, 3), (2, 3, 4), (1, 2, 3, 4, 5)]
    for _ in range(2):
        for batch in (0, 1):
            assert len(list(measured.of(without_the_first, batch))) == 3
    assert len(runs) == len(batches)
    assert list(measured.of([range(6)], 0)) == [0.0]
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    assert model(**batches[0]).logits.equal(before)


# One variant of every family, and the one whose norms stand on the stream. Transformers reads no plain tokenizer beside
# a qwen2, whose layers are those of llama.
FAMILIES = [v for family, v in {v.family: v for v in reversed(tiny.VARIANTS)}.items() if family != "qwen2"]
FAMILIES += [v for v in tiny.VARIANTS if str(v) == "opt-350m"]


@pytest.mark.parametrize("variant", FAMILIES, ids=str)
def test_what_is_measured_is_what_the_target_does(
    variant: tiny.Variant, llama: Path, text: Path, tmp_path: Path
) -> None:
    """The KL of the layers found is that of the model made of them, per-layer settings of the config included."""
    raw = tiny.config(variant) | {table(variant.family).keys["layer"]: 4}
    if "layer_types" in raw:
        raw["layer_types"] = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
        raw |= {"sliding_window": 5} | ({"use_sliding_window": True} if "use_sliding_window" in raw else {})
    images = table(variant.family).modality == "image"
    if not images:
        raw["vocab_size"] = 61
    raw = config_of(raw).to_dict() | raw
    model = new_model(raw["architectures"][0], raw, torch.float32)
    random_weights(model, 0)
    model.save_pretrained(tmp_path)
    if images:
        data = painted(tmp_path / "images.parquet")
        scores = anysize.calibrate(tmp_path, data, tokens=6, batch_size=2)
    else:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes((llama / name).read_bytes())
        scores = anysize.calibrate(tmp_path, text, sequence_length=16, second_moments=False)
    tensors = Checkpoint(tmp_path)
    found = searched(tensors, 2, scores, Options(layers="evolutionary"), lambda *_: None)
    assert found.num_sets == 6
    plan = anysize.plan(tmp_path, num_hidden_layers=2, layers=found.listed)
    made = build_model(plan.model_class, plan.target_config, target_tensors(plan, tensors), torch.float32)
    source = load(tmp_path, plan.model_class)
    from anysize.calibration.data import batches_again

    total = count = 0.0
    with torch.no_grad():
        for batch in batches_again(scores.record, anysize.config.understand(raw), tensors, limit=32_768):
            values = next(iter(batch.values()))
            total += divergence.kl(source(**batch).logits, made(**batch).logits) * len(values)
            count += len(values)
    assert found.kl == pytest.approx(total / count, rel=1e-4)
    assert found.kl == min(found.named.values(), default=found.kl) or found.kl < min(found.named.values())


def painted(path: Path) -> Path:
    """A parquet file of six images."""
    import datasets
    from PIL import Image

    rows = []
    for shade in range(0, 240, 40):
        file = path.with_name(f"{shade}.png")
        Image.new("RGB", (12, 12), (shade, 0, 255 - shade)).save(file)
        rows.append({"image": {"bytes": file.read_bytes(), "path": file.name}})
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


KILLED = """
import os, signal, sys
import anysize

def progress(stage, done, total):
    if stage == "search" and done > 20_000:
        os.kill(os.getpid(), signal.SIGKILL)

anysize.plan(sys.argv[1], num_hidden_layers=3, layers="evolutionary", calibration=sys.argv[2], progress=progress)
"""


def test_a_killed_plan_goes_on_where_it_was(six: tuple[Path, Any], tmp_path: Path, cache: Path) -> None:
    source, scores = six
    scores.save(tmp_path / "scores.safetensors")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "scores.safetensors")]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    (state,) = cache.iterdir()
    left = state.read_text()
    assert len(left.splitlines()) == 1 + 20_000 // 512 + 1

    def plan() -> Any:
        found = anysize.plan(source, num_hidden_layers=3, layers="evolutionary", calibration=scores)
        assert list(cache.iterdir()) == []
        return found

    resumed, whole = plan(), plan()
    state.write_text(left)
    assert resumed.to_json() == whole.to_json() == plan().to_json()
    # A measurement that only the file can know shows that it is read.
    layers, batch, value = json.loads(left.splitlines()[1])
    assert (layers, batch) == ([0, 1, 2], 0)
    state.write_text(left.replace(str(value), "-1000.0"))
    assert kept(plan()) == [0, 1, 2]


def test_another_search_does_not_take_up_its_state(six: tuple[Path, Any], cache: Path) -> None:
    source, scores = six

    def stopped(stage: str, _done: int, _total: int) -> None:
        if stage == "search":
            raise KeyboardInterrupt

    for options in ({"seed": 0}, {"seed": 1}, {"num_hidden_layers": 2}, {"search_tokens": 900_000}, {"seed": 0}):
        with pytest.raises(KeyboardInterrupt):
            anysize.plan(
                source, calibration=scores, layers="evolutionary", progress=stopped,
                **{"num_hidden_layers": 3, **options},
            )  # fmt: skip
    assert len(list(cache.iterdir())) == 4


def test_width_is_cut_as_well_and_the_proofs_hold(six: tuple[Path, Any], tmp_path: Path, cli: Run) -> None:
    source, scores = six
    scores.save(tmp_path / "scores.safetensors")
    ran = cli(
        "resize", source, tmp_path / "out", "--num-hidden-layers", 4, "--intermediate-size", 40, "--layers",
        "evolutionary", "--search-tokens", 150_000, "--preset", "subcloning", "--calibration",
        tmp_path / "scores.safetensors",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "search for layers ..." in ran.err
    assert "the least of 15 sets of layers" in ran.out
    plan = json.loads((tmp_path / "out" / "anysize.json").read_text())["plan"]
    assert (plan["options"]["layers"], plan["options"]["search_tokens"]) == ("evolutionary", 150_000)
    assert cli("verify", source, tmp_path / "out").code == 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"search_tokens": 5000}, "search_tokens=5000: to search for 3 of 6 layers takes at least 119040 tokens"),
        ({"search_tokens": 0}, "search_tokens=0: Input should be greater than or equal to 1"),
        ({"layers": "middle", "search_tokens": 5}, "search_tokens=5: the layers 'middle' are not searched for"),
        ({"calibration": None}, "'evolutionary' runs the source on data: pass --calibration, or choose middle"),
        ({"num_hidden_layers": 8, "calibration": None}, "layers 'evolutionary': num_hidden_layers is not below"),
        ({"num_hidden_layers": 6, "hidden_size": 16}, "layers 'evolutionary': num_hidden_layers is not below"),
    ],
)
def test_a_search_that_cannot_be_is_refused(six: tuple[Path, Any], options: dict[str, Any], why: str) -> None:
    asked = {"num_hidden_layers": 3, "layers": "evolutionary", "calibration": six[1], **options}
    with pytest.raises(SizeError) as refusal:
        anysize.plan(six[0], **asked)
    assert why in str(refusal.value)


def test_data_that_are_gone_and_a_cache_that_cannot_be_written_are_named(
    six: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    source, scores = six
    gone = replace(scores, record=scores.record.model_copy(update={"data": str(tmp_path / "gone.txt")}))
    with pytest.raises(InputError, match=r"gone\.txt' do not exist"):
        anysize.plan(source, calibration=gone, num_hidden_layers=3, layers="evolutionary")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYSIZE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set ANYSIZE_CACHE to a folder that can be written"):
        anysize.plan(source, calibration=scores, num_hidden_layers=3, layers="evolutionary")


def test_depth_that_is_locked_is_refused_before_any_search(text: Path, llama: Path, tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if v.family == "gpt2")
    raw = tiny.config(variant) | {"scale_attn_by_inverse_layer_idx": True, "vocab_size": 61}
    new_model(raw["architectures"][0], raw, torch.float32).save_pretrained(tmp_path)
    scores = anysize.calibrate(tmp_path, text, tokenizer=str(llama), sequence_length=16, second_moments=False)
    with pytest.raises(SizeError, match="num_hidden_layers 2 -> 1: scores are divided by the layer's number"):
        anysize.plan(tmp_path, calibration=scores, num_hidden_layers=1, layers="evolutionary")
