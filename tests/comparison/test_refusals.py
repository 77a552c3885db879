"""Comparisons that make no sense are refused by name, before any training, and leave nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from anysize.comparison.config import compare_config
from anysize.errors import InputError, SizeError
from tests.comparison.runs import carried_out, config_of
from tests.conftest import Ran

Run = Callable[..., Ran]


def test_arms_of_other_sizes_are_refused(
    llama: Path, new_llama: Callable[..., Path], story: Path, tmp_path: Path, cli: Run
) -> None:
    other = new_llama(tmp_path / "other", intermediate_size=40)
    arms = {"random": {"random": True}, "theirs": {"source": str(other)}}
    config = config_of(llama, story, tmp_path / "out", arms=arms, target={"scale": 0.5})
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = cli("compare", tmp_path / "c.yaml")
    assert done.code == 2
    assert "arm 'theirs': target makes" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("first", [{"random": True}, {"preset": "subspace"}])
def test_an_arm_whose_listed_layers_make_another_depth_is_refused(
    llama: Path, story: Path, tmp_path: Path, cli: Run, first: dict[str, Any]
) -> None:
    arms = {"first": first, "listed": {"layers": "1"}}
    config = config_of(llama, story, tmp_path / "out", arms=arms, target={"intermediate_size": 24}, goals=["first"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    done = cli("compare", tmp_path / "c.yaml")
    assert done.code == 2
    told = done.err.replace("\n", " ")
    assert "arm 'listed': target makes" in told
    assert "with layers '1'" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target": {"hidden_size": 17}}, "hidden_size"),
        ({"target": {"scale": 1.0, "hidden_size": 16, "num_params": 5}}, "both choose the sizes"),
        ({"target": {"vocab_size": 70}}, "target.vocab_size"),
        ({"source": "nowhere/at/all/x"}, "nowhere"),
        ({"arms": {"random": {"random": True}, "far": {"source": "OTHER"}}}, "has 47 tokens"),
        ({"training": {"max_steps": 8, "per_device_train_batch_size": 4000}}, "one step"),
        ({"training": {"max_steps": 8, "gradient_accumulation_steps": 4000}}, "one step"),
        ({"training": {"max_steps": 8, "dataloader_drop_last": True}}, "every step is whole"),
        ({"training": {"max_steps": 8, "gradient_accumulation_steps": 0}}, "training.gradient_accumulation_steps is 0"),
        ({"arms": {"random": {"random": True, "training": {"lr_scheduler_type": "cosin"}}}}, "refuses training"),
        (
            {"arms": {"random": {"random": True, "training": {"lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}}}},
            "cannot make the optimizer or the schedule",
        ),
        ({"arms": {"random": {"random": True}, "wide": {"preset": "fresh"}}}, "arm 'wide': preset 'fresh' grows"),
        (
            {"arms": {"random": {"random": True}, "ours": {"distill": {"fade_steps": 9}}}},
            "arm 'ours': distill.fade_steps is 9 of 8 steps",
        ),
        ({"seeds": [-1]}, "seeds: -1, wanted 0 to 4294967295"),
    ],
)
def test_what_is_refused_before_any_training(
    llama: Path,
    story: Path,
    tmp_path: Path,
    cli: Run,
    new_llama: Callable[..., Path],
    changes: dict[str, Any],
    told: str,
) -> None:
    text = yaml.safe_dump(config_of(llama, story, tmp_path / "out", **changes))
    if "OTHER" in text:
        text = text.replace("OTHER", str(new_llama(tmp_path / "other", vocab_size=47)))
    (tmp_path / "c.yaml").write_text(text)
    done = cli("compare", tmp_path / "c.yaml")
    assert done.code == 2
    assert told in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_the_folder_of_another_comparison_is_refused_and_stays(
    llama: Path, story: Path, tmp_path: Path, cli: Run
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "comparison.json").write_text('{"source": "another"}')
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_of(llama, story, output)))
    done = cli("compare", tmp_path / "c.yaml")
    assert done.code == 2
    assert "holds another comparison" in done.err
    assert [p.name for p in output.iterdir()] == ["comparison.json"]


@pytest.mark.parametrize(
    ("arm", "sentence"),
    [
        ({"stream_scale": 2.0}, "arm 'loud': stream_scale=2: llama cannot have it, because its rms_norm_eps is 2.0"),
        ({"untie": True}, "arm 'loud': untie: the head of this model is not tied"),
    ],
)
def test_what_an_arm_cannot_have_is_told_before_calibration(
    new_llama: Any, story: Path, tmp_path: Path, arm: dict[str, Any], sentence: str
) -> None:
    source = new_llama(tmp_path / "source", rms_norm_eps=2.0)
    config = config_of(source, story, tmp_path / "out", arms={"random": {"random": True}, "loud": arm})
    with pytest.raises(SizeError, match=sentence):
        carried_out(config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [0, 9, True, "2"])
def test_a_factor_out_of_range_is_refused_with_its_key(llama: Path, story: Path, tmp_path: Path, scale: object) -> None:
    config = config_of(llama, story, tmp_path / "out", arms={"loud": {"stream_scale": scale}}, goals=["loud"])
    with pytest.raises(InputError, match=r"arms\.loud\.stream_scale"):
        compare_config(config, "c.yaml")
