"""A stream that is written louder or quieter computes the same, in every family that can have it, and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.shrink.test_families import request, scores_for

import anysize
from anysize.calibration.scores import Scores
from anysize.config import understand
from anysize.errors import ProofError, SizeError
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.proof.algebra import check_rows, rows_of
from anysize.proof.distance import logit_error
from anysize.proof.replan import differences
from anysize.recipe import Options, Plan
from anysize.training.stream import stream_writer

TOLERANCE = 1e-5
REFUSED = {
    "gemma2": "a norm ends each branch",
    "gemma3_text": "a norm ends each branch",
    "olmo2": "a norm ends each branch",
    "olmo-": "no config key holds the eps",
    "opt": "no config key holds the eps",
}


def why(variant: tiny.Variant) -> str:
    return next((text for name, text in REFUSED.items() if str(variant).startswith(name)), "")


def loud_eps(variant: tiny.Variant) -> NamedTensors:
    """A source whose eps counts: what forgets to scale it shows."""
    source = tiny.source(variant)
    key = understand(source.config).architecture.stream_eps
    return NamedTensors({**source.config, key: 0.3}, {name: source.read(name) for name in source.tensors})


def error(plan: Plan, source: NamedTensors, variant: tiny.Variant, **changes: Any) -> float:
    given = tiny.inputs(variant)
    wanted = tiny.logits(source.config, {name: source.read(name) for name in source.tensors}, given)
    return logit_error(wanted, tiny.logits({**plan.target_config, **changes}, target_tensors(plan, source), given))


@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_what_is_computed_stays(variant: tiny.Variant) -> None:
    if reason := why(variant):
        with pytest.raises(SizeError, match=rf"stream_scale=0\.5: {variant.family} .*{reason}"):
            make_plan(tiny.source(variant), {"num_hidden_layers": 3}, Options(stream_scale=0.5))
        return
    source = loud_eps(variant)
    sizes = {"intermediate_size": understand(source.config).sizes["ffn"] + 8, "num_hidden_layers": 3}
    plan = make_plan(source, sizes, Options(stream_scale=0.5))
    assert plan.exact
    assert error(plan, source, variant) < TOLERANCE
    key = understand(source.config).architecture.stream_eps
    assert plan.target_config[key] == pytest.approx(0.3 * 0.25)
    assert error(plan, source, variant, **{key: 0.3}) > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama-GQA-tied", "qwen3-GQA-tied", "gemma-MHA-tied", "gpt2-tied", "vit-bias"])
def test_it_goes_with_a_wider_stream(name: str) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == name)
    source = loud_eps(variant)
    # Without a head width of its own, a wider stream has more heads.
    sizes = {} if "head" in understand(source.config).architecture.keys else {"num_attention_heads": 6}
    plan = make_plan(source, {"hidden_size": 48, **sizes}, Options(stream_scale=3.0))
    assert error(plan, source, variant) < TOLERANCE


@pytest.mark.parametrize("readers", ["least-squares", "sequential"])
def test_a_cut_model_computes_what_it_did_before(
    tied_llama: Path, tied_scores: Scores, readers: str, tmp_path: Path
) -> None:
    plain, loud = (
        anysize.plan(
            tied_llama, calibration=tied_scores, hidden_size=16, intermediate_size=24, preset="subspace",
            readers=readers, stream_scale=scale,
        )
        for scale in (1.0, 2.0)
    )  # fmt: skip
    before, after = (target_tensors(plan, Checkpoint(tied_llama)) for plan in (plain, loud))
    times = {"embed_tokens": 2.0, "o_proj": 2.0, "down_proj": 2.0, "model.norm": 0.5}
    for name, values in before.items():
        wanted = next((factor for part, factor in times.items() if part in name), 1.0)
        assert torch.equal(after[name], values * wanted), name
    ids = {"input_ids": torch.arange(16)[None]}
    one, other = (
        tiny.logits({**plan.target_config, "architectures": [plan.model_class]}, tensors, ids)
        for plan, tensors in ((plain, before), (loud, after))
    )
    assert logit_error(one, other) < TOLERANCE
    anysize.apply(loud, tmp_path / "out", verify="full")


@pytest.mark.parametrize("variant", [v for v in tiny.VARIANTS if not why(v)], ids=str)
def test_every_family_is_cut_with_it(variant: tiny.Variant) -> None:
    source, scores = tiny.source(variant), scores_for(variant)
    made: list[torch.Tensor] = []
    for scale in (1.0, 2.0):
        options = Options(preset="subspace", readers="least-squares", layers="first", stream_scale=scale)
        plan = make_plan(source, request(variant), options, lambda: scores)
        tensors = target_tensors(plan, source)
        made.append(tiny.logits(plan.target_config, tensors, tiny.inputs(variant)))
        written = rows_of(NamedTensors(plan.target_config, tensors))
        assert check_rows(plan, rows_of(source), written).passed
        assert not differences(plan, source)
    assert logit_error(*made) < TOLERANCE
    # The control: written as large as before, it is not what the plan says.
    plain = make_plan(source, request(variant), options.model_copy(update={"stream_scale": 1.0}), lambda: scores)
    assert not check_rows(plain, rows_of(source), written).passed


@pytest.mark.parametrize("options", [{"preset": "weight-selection"}, {"preset": "subspace", "readers": "sequential"}])
def test_a_cut_plan_with_another_factor_is_refused(
    tied_llama: Path, tied_scores: Scores, options: dict[str, str]
) -> None:
    scores = tied_scores if options["preset"] == "subspace" else None
    plan = anysize.plan(
        tied_llama, calibration=scores, hidden_size=16, intermediate_size=24, stream_scale=2.0, **options
    )
    source = Checkpoint(tied_llama)
    assert not differences(plan, source)
    silent = plan.model_copy(
        update={"options": plan.options.model_copy(update={"stream_scale": 1.0}),
                "target_config": {**plan.target_config, "rms_norm_eps": 1e-6}}
    )  # fmt: skip
    assert any(text.startswith("factor of model.embed_tokens.weight is 2.0") for text in differences(silent, source))
    names = ["model.layers.0.self_attn.o_proj.weight", "model.norm.weight"]
    for name in names:
        recipes = tuple(r.model_copy(update={"factor": 1.0}) if r.name == name else r for r in plan.recipes)
        found = differences(plan.model_copy(update={"recipes": recipes}), source)
        assert [text.partition(" is ")[0] for text in found] == [f"factor of {name}"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_proved_and_float16_is_warned_of(
    new_llama: Callable[..., Path], tmp_path: Path, dtype: str
) -> None:
    source = new_llama(tmp_path / "half", dtype=dtype, tie_word_embeddings=True)
    plan = anysize.plan(source, hidden_size=48, stream_scale=2.0)
    anysize.apply(plan, tmp_path / "out", verify="full")
    warned = any("float16 ends at 65,504" in note for note in plan.notes)
    assert warned == (dtype == "float16")


def test_an_untied_head_keeps_its_gain(tied_llama: Path, tmp_path: Path) -> None:
    plan = anysize.plan(tied_llama, untie=True, stream_scale=2.0)
    factors = {recipe.name: recipe.factor for recipe in plan.recipes}
    assert factors["model.norm.weight"] == factors["lm_head.weight"] == 1.0
    assert factors["model.embed_tokens.weight"] == 2.0
    anysize.apply(plan, tmp_path / "out", verify="full")


def test_a_model_in_memory_and_its_saved_plan(tmp_path: Path) -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "vit-bias")
    model = tiny.model(variant, dtype=torch.float32)
    plan = anysize.plan(model, stream_scale=0.5)
    plan.save(tmp_path / "plan.json")
    made = anysize.apply(Plan.load(tmp_path / "plan.json"), source=model)
    given = {name: values.float() for name, values in tiny.inputs(variant).items()}
    with torch.no_grad():
        assert logit_error(model(**given).logits, made(**given).logits) < TOLERANCE


def test_gains_stored_less_one_are_not_divided_by_much() -> None:
    variant = next(v for v in tiny.VARIANTS if str(v) == "gemma-MHA-tied")
    with pytest.raises(SizeError, match=r"stream_scale=5: the head is tied and the final gain.*or --untie"):
        make_plan(tiny.source(variant), {}, Options(stream_scale=5.0))
    make_plan(tiny.source(variant), {}, Options(stream_scale=4.0))
    make_plan(tiny.source(variant), {}, Options(stream_scale=5.0, untie=True))


@pytest.mark.parametrize("eps", ["1e-6", True, -1e-6, None])
def test_an_eps_that_is_no_number_is_refused(eps: object) -> None:
    source = tiny.source(tiny.VARIANTS[0])
    wrong = NamedTensors({**source.config, "rms_norm_eps": eps}, {name: source.read(name) for name in source.tensors})
    with pytest.raises(SizeError, match=r"because its rms_norm_eps is .*wanted a number from 0 to 1"):
        make_plan(wrong, {}, Options(stream_scale=2.0))


def test_a_config_without_an_eps_has_that_of_transformers() -> None:
    source = tiny.source(tiny.VARIANTS[0])
    raw = {key: value for key, value in source.config.items() if key != "rms_norm_eps"}
    bare = NamedTensors(raw, {name: source.read(name) for name in source.tensors})
    assert make_plan(bare, {}, Options(stream_scale=2.0)).target_config["rms_norm_eps"] == pytest.approx(4e-6)


def test_a_plan_with_it_is_saved_replayed_and_proved(tied_llama: Path, tmp_path: Path) -> None:
    plan = anysize.plan(tied_llama, hidden_size=64, stream_scale=0.5)
    assert "the residual stream is 0.5 times as large, with rms_norm_eps 1e-06 -> 2.5e-07" in plan.notes
    plan.save(tmp_path / "plan.json")
    anysize.apply(Plan.load(tmp_path / "plan.json"), tmp_path / "out", verify="full")
    edited = plan.model_copy(update={"options": plan.options.model_copy(update={"stream_scale": 1.0})})
    with pytest.raises(ProofError, match=r"target_config\.rms_norm_eps is 2\.5e-07, planned 1e-06"):
        anysize.apply(edited, tmp_path / "edited")


def test_new_gains_before_a_tied_head_follow(tied_llama: Path) -> None:
    plan = anysize.plan(tied_llama, hidden_size=64, stream_scale=0.5)
    gains = target_tensors(plan, Checkpoint(tied_llama))
    assert (gains["model.norm.weight"][32:] == 2.0).all()
    assert (gains["model.layers.0.input_layernorm.weight"][32:] == 1.0).all()
    # The control: gains that do not follow are not what the plan says.
    wrong = {name: values.clone() for name, values in gains.items()}
    wrong["model.norm.weight"][32:] = 1.0
    source = rows_of(Checkpoint(tied_llama))
    assert check_rows(plan, source, rows_of(NamedTensors(plan.target_config, gains))).passed
    assert not check_rows(plan, source, rows_of(NamedTensors(plan.target_config, wrong))).passed


def test_the_map_of_the_stream_has_it(tied_llama: Path) -> None:
    plain, quiet = (stream_writer(anysize.plan(tied_llama, hidden_size=64, stream_scale=s)) for s in (1.0, 0.5))
    assert torch.equal(quiet, 0.5 * plain)


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.1, 9.0, float("nan"), float("inf"), True, "2"])
def test_what_is_no_factor_is_refused(tied_llama: Path, scale: Any) -> None:
    with pytest.raises(SizeError, match="stream_scale="):
        anysize.plan(tied_llama, hidden_size=64, stream_scale=scale)


@pytest.mark.parametrize("options", [{"preset": "subspace"}, {"preset": "hypercloning-noisy", "noise_db": 20.0}])
def test_alone_it_has_no_use_for_a_preset(tied_llama: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SizeError, match=f"preset '{options['preset']}': no size was asked for"):
        anysize.plan(tied_llama, stream_scale=2.0, **options)
