"""Norms of a narrower stream: what a LayerNorm makes of a selection, what ends a branch, and what spans all heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.arch.schema import is_per_layer, tensor_name
from anysize.calibration.data import DataOptions, token_batches, tokenizer_of
from anysize.calibration.scores import Scores, model_sha256
from anysize.calibration.sites import sites
from anysize.config import understand
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors, build_model, paths_by_disk_name
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.proof.algebra import check_rows, rows_of
from anysize.proof.cuts import miniature_scores
from anysize.proof.parity import load
from anysize.recipe import Options, Plan
from tests import tiny
from tests.shrink.test_sequential import written

# Of 24 coordinates: a whole number of heads, where these make up the width.
KEPT = 16


def variant(name: str) -> tiny.Variant:
    return next(v for v in tiny.VARIANTS if str(v) == name)


def scores_of(source: NamedTensors) -> Scores:
    found = miniature_scores(source, understand(source.config))
    return replace(found, record=found.record.model_copy(update={"model_sha256": model_sha256(source)}))


def planned(source: NamedTensors, sizes: dict[str, int], **options: Any) -> Plan:
    scores = scores_of(source)
    return make_plan(source, sizes, Options.model_validate(options), lambda: scores)


def changed(name: str, change: dict[str, Any]) -> NamedTensors:
    """A source of which some tensors are multiplied: by what their names hold."""
    source = tiny.source(variant(name))
    tensors = {tensor: source.read(tensor) for tensor in source.tensors}
    for part, factor in change.items():
        for tensor in [tensor for tensor in tensors if part in tensor]:
            tensors[tensor] = tensors[tensor] * factor
    return NamedTensors(source.config, tensors)


def error(source: NamedTensors, plan: Plan, name: str) -> float:
    """The mean square of what the logits differ by, over what they vary by."""
    given = tiny.inputs(variant(name))
    wanted = tiny.logits(source.config, {n: source.read(n) for n in source.tensors}, given)
    got = tiny.logits(plan.target_config, target_tensors(plan, source), given)
    return float((wanted - got).square().mean() / wanted.var())


def with_plain_gains(plan: Plan) -> Plan:
    plain = [r.model_copy(update={"factor": 1.0}) if "norm" in r.name else r for r in plan.recipes]
    return plan.model_copy(update={"recipes": tuple(plain)})


def loud(count: int, size: int = 24) -> torch.Tensor:
    """What leaves some coordinates as they are and the rest with next to nothing."""
    return torch.where(torch.arange(size) < count, 1.0, 0.02).double()


# By name: how much is kept, and of what the rest is quiet. Heads make up the width of OLMo 2, so that they are cut too.
UNEVEN: dict[str, tuple[int, dict[str, Any]]] = {
    "olmo2-GQA-untied": (
        KEPT,
        {
            "embed_tokens": loud(KEPT), "o_proj": loud(KEPT)[:, None] * loud(KEPT), "down_proj": loud(KEPT)[:, None],
            "q_proj": loud(KEPT)[:, None], "k_proj": loud(KEPT // 2, 12)[:, None],
        },
    ),
    "gemma2-GQA-untied": (
        12, {"embed_tokens": loud(12), "o_proj": loud(12)[:, None], "down_proj": loud(12)[:, None]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("readers", ["least-squares", "measured"])
@pytest.mark.parametrize("name", UNEVEN)
def test_branches_whose_norms_divide_by_less_write_as_much_as_before(name: str, readers: str) -> None:
    kept, change = UNEVEN[name]
    source = changed(name, change)
    plan = planned(source, {"hidden_size": kept}, select="activation", readers=readers)
    assert list(plan.axes["hidden"].index) == list(range(kept))
    factors = {r.name: r.factor for r in plan.recipes if r.factor != 1 and "norm" in r.name}
    ends = ["post_attention_layernorm", "post_feedforward_layernorm"]
    ends += ["self_attn.q_norm", "self_attn.k_norm"] if name.startswith("olmo2") else []
    assert set(factors) == {f"model.layers.{layer}.{end}.weight" for layer in (0, 1) for end in ends}
    # What is kept holds nearly all there is.
    assert all(factor == pytest.approx((24 / kept) ** 0.5, rel=0.01) for factor in factors.values())
    assert error(source, plan, name) < 0.3 * error(source, with_plain_gains(plan), name)
    made = NamedTensors(plan.target_config, target_tensors(plan, source))
    assert check_rows(plan, rows_of(source), rows_of(made)).passed


@pytest.mark.parametrize("preset", ["subcloning", "minitron", "weight-selection"])
def test_published_presets_leave_the_gains_of_branches_as_they_are(preset: str) -> None:
    kept, change = UNEVEN["gemma2-GQA-untied"]
    source = changed("gemma2-GQA-untied", change)
    scores = scores_of(source)
    calibration = None if preset == "weight-selection" else lambda: scores
    plan = make_plan(source, {"hidden_size": kept}, Options(preset=preset), calibration)
    assert {r.factor for r in plan.recipes if "norm" in r.name} == {1.0}


@pytest.mark.parametrize("select", ["activation", "rms"])
@pytest.mark.parametrize(
    ("name", "kept"), [("gemma2-GQA-untied", 12), ("gemma3_text-GQA-untied", 12), ("olmo2-GQA-untied", KEPT)]
)
def test_what_norms_silence_at_the_end_of_branches_is_dropped(name: str, kept: int, select: str) -> None:
    silent = torch.arange(24) < 4
    shouted = torch.where(silent, 20.0, 1.0).double()[:, None]
    source = changed(name, {"embed_tokens": (~silent).double(), "o_proj": shouted, "down_proj": shouted})
    tensors = {tensor: source.read(tensor) for tensor in source.tensors}
    for tensor in [t for t in tensors if "post_" in t]:
        tensors[tensor][silent] = 0.0 if name.startswith("olmo2") else -1.0
    plan = planned(NamedTensors(source.config, tensors), {"hidden_size": kept}, select=select, readers="none")
    assert min(plan.axes["hidden"].index) >= 4


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2"])
def test_norms_that_end_branches_come_in_the_order_of_what_writes_these(family: str) -> None:
    here = next(v for v in tiny.VARIANTS if v.family == family)
    model, config = tiny.model(here), understand(tiny.config(here))
    modules = {name: model.get_submodule(path) for name, path in paths_by_disk_name(model).items()}
    norms = config.architecture.norms
    ends = [tensor_name(p, 1) for p, n in norms.items() if n.writes == "hidden" and is_per_layer(p)]
    writers = [site.module for site in sites(config).values() if site.layer == 1 and site.side == "branch"]
    seen: dict[str, torch.Tensor] = {}
    for name in ends:
        modules[name].register_forward_pre_hook(lambda _m, args, name=name: seen.update({name: args[0]}))
    for name in writers:
        modules[name].register_forward_hook(lambda _m, _args, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        model(**tiny.inputs(here))
    assert len(ends) == 2
    assert all(seen[end].equal(seen[writer]) for end, writer in zip(ends, writers, strict=True))


@pytest.mark.parametrize("name", ["olmo2-attention_bias=True", "olmoe-GQA-untied"])
def test_a_norm_over_heads_gains_the_ratio_of_what_queries_are_in_the_source(
    name: str, llama: Path, text: Path, tmp_path: Path
) -> None:
    length = written(variant(name), llama, tmp_path)
    scores = anysize.calibrate(tmp_path, text, sequence_length=length, tokens=4096)
    plan = anysize.plan(tmp_path, calibration=scores, select="activation", readers="least-squares", hidden_size=KEPT)
    model, seen = load(tmp_path, plan.model_class), list[torch.Tensor]()
    model.get_submodule("model.layers.1.self_attn.q_proj").register_forward_hook(
        lambda _m, _args, out: seen.append(out.flatten(0, 1))
    )
    with torch.no_grad():
        for batch in token_batches(str(text), tokenizer_of(str(llama)), 61, DataOptions(4096, length, 8)):
            model(**batch)
    squares = torch.cat(seen).double().square().mean(0)
    # Two query heads of four channels for each kv head.
    kept = [int(head) * 8 + channel for head in plan.axes["kv.1"].index for channel in range(8)]
    (recipe,) = (r for r in plan.recipes if r.name == "model.layers.1.self_attn.q_norm.weight")
    assert recipe.factor == pytest.approx(float(squares[kept].mean() / squares.mean()) ** 0.5, rel=1e-3)


def given_by(model: Any, module: str, ids: torch.Tensor) -> torch.Tensor:
    """What a module of a model gives, float64 [tokens, size]."""
    seen: list[torch.Tensor] = []
    path = paths_by_disk_name(model)[module]
    model.get_submodule(path).register_forward_hook(lambda _m, _args, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    return seen[0].flatten(0, -2).double()


@pytest.mark.parametrize("name", ["gpt_neox-untied", "opt-untied", "olmo-GQA-untied"])
def test_what_reads_a_layer_norm_over_a_selection_is_the_best_there_is(name: str) -> None:
    """At the first norm the stream is that of the source, so what the target gives there is known."""
    source = tiny.source(variant(name))
    plan = planned(source, {"hidden_size": KEPT}, select="activation", readers="least-squares")
    config = understand(source.config)
    module = next(site.module for site in sites(config).values() if site.is_norm and site.layer == 0)
    ids = torch.randint(0, tiny.VOCAB, (48, 13), generator=torch.Generator().manual_seed(2))
    before, after = (
        build_model(config.model_class, raw, tensors, torch.float64)
        for raw, tensors in (
            (source.config, {n: source.read(n) for n in source.tensors}),
            (plan.target_config, target_tensors(plan, source)),
        )
    )
    wanted, offered = given_by(before, module, ids), given_by(after, module, ids)
    reader = torch.from_numpy(plan.dense[f"{module}:read"]).double()
    got = offered @ reader.T
    # What biases make up for counts as read.
    off = (wanted - got) - (wanted - got).mean(0)
    ones = torch.cat([offered, torch.ones(len(offered), 1, dtype=torch.float64)], 1)
    best = wanted - ones @ torch.linalg.lstsq(ones, wanted).solution
    assert float(off.square().sum()) < 1.1 * float(best.square().sum())


LOUD = {"layernorm_before.bias": 5.0, "layernorm_after.bias": 5.0, "vit.layernorm.bias": 5.0}


def test_the_bias_of_a_head_takes_over_what_its_norm_added() -> None:
    source = changed("vit-bias", LOUD)
    plan = planned(source, {"hidden_size": KEPT}, select="activation", readers="least-squares")
    made = target_tensors(plan, source)
    bias = torch.from_numpy(plan.dense["classifier.bias:value"])
    assert made["classifier.bias"].equal(bias.to(made["classifier.bias"].dtype))
    left = {**made, "classifier.bias": source.read("classifier.bias")}
    given = tiny.inputs(variant("vit-bias"))
    wanted = tiny.logits(source.config, {n: source.read(n) for n in source.tensors}, given)
    errors = [
        float((tiny.logits(plan.target_config, tensors, given) - wanted).square().mean()) for tensors in (made, left)
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize(
    ("name", "reader"),
    [("opt-untied", "model.decoder.layers.0.fc1"), ("gpt_neox-untied", "gpt_neox.layers.0.mlp.dense_h_to_4h")],
)
def test_what_biases_took_over_is_not_fitted_once_more(
    name: str, reader: str, llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    length = written(variant(name), llama, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    loud = {n: w * 5 if "norm" in n and n.endswith("bias") else w for n, w in weights.items()}
    save_file(loud, tmp_path / "model.safetensors", {"format": "pt"})
    scores = anysize.calibrate(tmp_path, text, sequence_length=length)
    batches = token_batches(str(text), tokenizer_of(str(llama)), 61, DataOptions(2048, length, 8))
    ids = torch.cat([batch["input_ids"] for batch in batches])
    wanted = given_by(load(tmp_path, Checkpoint(tmp_path).config["architectures"][0]), reader, ids)
    found: list[float] = []
    for _ in range(2):
        plan = anysize.plan(tmp_path, calibration=scores, select="activation", readers="sequential", hidden_size=KEPT)
        tensors = target_tensors(plan, Checkpoint(tmp_path))
        got = given_by(build_model(plan.model_class, plan.target_config, tensors, torch.float32), reader, ids)
        found.append(float((wanted - got).square().mean()))
        monkeypatch.setattr("anysize.sequential.Sequential._shift", lambda *_: 0.0)
    assert found[0] < 0.7 * found[1]
