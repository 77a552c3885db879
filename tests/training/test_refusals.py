"""What training refuses, in one sentence, before anything that takes long, leaving nothing behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from anysize.errors import InputError
from anysize.progress import quiet
from anysize.training.config import train_config
from anysize.training.run import train
from tests.conftest import Ran
from tests.training.runs import config_of, written

Run = Callable[..., Ran]


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"validation": "nowhere.txt"}},
        {"data": {"sequence_length": 4096}},
        {"distill": {"teacher": "OTHER"}},
        {"distill": {"teacher": "ALIKE", "hidden_weight": 1}},
        {"distill": {"hidden_weight": 1, "top_k": 2, "cache": "kept"}},
        {"training": {"report_to": "comet_ml"}},
        {"training": {"fsdp": True}},
        {"training": {"optim": "adafactor"}, "recipe": {"learning_rate_factors": {"norm": 2}}},
        {"distill": {"fade_steps": 13}},
    ],
)
def test_what_can_be_refused_is_refused_before_a_calibration(
    llama: Path, story: Path, tmp_path: Path, new_llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    half = {"source": str(llama), "intermediate_size": 24, "calibration": {"tokens": 2048, "sequence_length": 64}}
    raw = config_of(llama, story, tmp_path / "out", resize=half)
    raw["model"] = ""
    for section, asked in changes.items():
        raw[section] = raw.get(section, {}) | asked
    teacher = changes.get("distill", {}).get("teacher")
    if teacher:
        unlike = {"vocab_size": 47} if teacher == "OTHER" else {"num_hidden_layers": 1}
        raw["distill"]["teacher"] = str(new_llama(tmp_path / "other", **unlike))

    def calibrated(*_: object, **__: object) -> None:
        pytest.fail("it was calibrated")

    monkeypatch.setattr("anysize.calibration.calibrate.calibrated", calibrated)
    with pytest.raises(InputError):
        train(train_config(raw, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    assert not (tmp_path / "out").exists()


def rewrite_tokens(folder: Path, token: Callable[[int], int]) -> None:
    place = folder / "tokenizer.json"
    told = json.loads(place.read_text())
    told["model"]["vocab"] = {word: token(number) for word, number in told["model"]["vocab"].items()}
    place.write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"training": {"learning_rate": 1e30, "max_grad_norm": 0}}, "training diverged at step"),
        ({"distill": {"teacher": "TEACHER"}}, "has 47 tokens or classes and the student 61"),
        ({"recipe": {"new_parameters": {"warmup_steps": 3}}}, "only a start that a plan makes (resize) has new"),
        ({"distill": {"teacher": "SOURCE", "hidden_weight": 1}}, "needs the writer maps of a plan"),
        ({"training": {"optim": "adafactor"}, "recipe": {"learning_rate_factors": {"norm": 2}}}, "needs AdamW"),
        ({"training": {"report_to": "comet_ml"}}, "cannot be used: training.report_to: CometCallback requires"),
        ({"distill": {"teacher": "SPELLED"}}, "60 tokens have other ids there"),
        ({"training": {"fsdp": True}}, "training.fsdp: shards are for several accelerators"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "transformers refuses training"),
        ({"training": {"lr_scheduler_kwargs": {"min_lr_ratio": 0.1}}}, "cannot make the optimizer or the schedule"),
        ({"training": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 0.5}}}, "cannot make the"),
        ({"training": {"optim": "adamw_8bit"}}, "cannot make the optimizer or the schedule"),
        ({"training": {"label_smoothing_factor": 0.1}}, "smoothed ones are others"),
        ({"training": {"num_train_epochs": 3}}, "training.num_train_epochs is not read where training.max_steps is 12"),
        ({"training": {"save_strategy": "epoch"}}, "training.save_steps is not read where training.save_strategy is"),
        ({"training": {"save_only_model": True}}, "'training.save_only_model' is told by nothing: a run that goes on"),
        ({"training": {"prediction_loss_only": True}}, "'training.prediction_loss_only' is told by nothing"),
        (
            {"training": {"torch_compile": True, "torch_compile_mode": "foo"}},
            "torch_compile_mode is 'foo': wanted one of",
        ),
        ({"training": {"use_liger_kernel": True}}, "training.use_liger_kernel needs liger-kernel installed"),
        ({"training": {"gradient_checkpointing_kwargs": {"reentrant": 1}}}, "kwargs.reentrant' (did you mean"),
        (
            {"training": {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}},
            "num_steps' is told by gradient_accumulation_steps",
        ),
        (
            {"training": {"load_best_model_at_end": True, "metric_for_best_model": "foo"}},
            "training.metric_for_best_model is 'foo': wanted validation_loss",
        ),
        ({"training": {"logging_nan_inf_filter": True}}, "is told by nothing: a run whose loss is not finite has div"),
        (
            {
                "training": {"max_steps": -1, "num_train_epochs": 0.5},
                "distill": {"teacher": "SOURCE", "fade_steps": 5000},
            },
            "distill.fade_steps is 5000 of",
        ),
        ({"training": {"push_to_hub": True}}, "transformers refuses to train"),
        (
            {"training": {"activation_checkpointing_kwargs": {"use_reentrnt": False}}},
            "kwargs.use_reentrnt' (did you",
        ),
        ({"data": {"train": ""}}, "data.train"),
        ({"distill": {"teacher": "SOURCE", "until_step": True}}, "distill.until_step: true, and it is nothing to"),
        ({"distill": {"teacher": "SOURCE", "self_data": {"prompt_tokens": 32}}}, "and a sequence has 32: the teacher"),
        ({"training": {"auto_find_batch_size": True}}, "is told by per_device_train_batch_size"),
        (
            {"training": {"optim_args": "weight_decay=1"}},
            "training.optim_args: 'weight_decay' is nothing that the optimizer 'adamw_torch",
        ),
        (
            {"training": {"optim": "sgd", "optim_args": "momentum=0.9, nestrov=true"}},
            "'nestrov' is nothing that the optimizer 'sgd' takes from there (did you mean 'nesterov'?): it takes",
        ),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1: wanted a number of 0 or more"),
    ],
)
def test_what_a_run_refuses(
    llama: Path,
    story: Path,
    tmp_path: Path,
    cli: Run,
    new_llama: Callable[..., Path],
    changes: dict[str, Any],
    told: str,
) -> None:
    teacher = changes.get("distill", {}).get("teacher")
    if teacher:
        places = {"SOURCE": llama, "TEACHER": tmp_path / "teacher", "SPELLED": tmp_path / "spelled"}
        if teacher == "TEACHER":
            new_llama(places[teacher], vocab_size=47)
        if teacher == "SPELLED":
            shutil.copytree(llama, places[teacher])
            rewrite_tokens(places[teacher], lambda token: 60 - token)
        changes = {"distill": {**changes["distill"], "teacher": str(places[teacher])}}
    done = cli("train", written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out", **changes)))
    assert done.code == 2, done.err
    assert told in done.err
    assert "Traceback" not in done.err
    assert (tmp_path / "out").exists() is ("diverged" in told)


def test_held_out_documents_without_a_word_are_refused(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    parquet.write_table(pa.table({"text": [""] * 64}), tmp_path / "empties.parquet")
    raw = config_of(llama, story, tmp_path / "out")
    raw["data"]["validation"] = str(tmp_path / "empties.parquet")
    done = cli("train", written(tmp_path / "c.yaml", raw))
    assert done.code == 2
    assert "empties.parquet' hold no text" in done.err.replace("\n", " ")
    assert not (tmp_path / "out").exists()


def test_processes_that_would_train_alone_are_refused(
    llama: Path, story: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = cli("train", written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out")))
    assert done.code == 2
    assert "2 processes were started and each trains alone" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recipe": {"new_parameters": {"learning_rate_factor": 2}}}, "no size of the target is larger"),
        ({"recipe": {"optimizer_state": "carried"}}, "this target does not: it has less hidden"),
        (
            {"recipe": {"optimizer_state": "carried"}, "resize": {"intermediate_size": 96, "untie": True}},
            "both its uses, and untie parts them",
        ),
        ({"training": {"metric_for_best_model": "foo"}}, "metric_for_best_model is 'foo': wanted validation_loss"),
        ({"distill": {"self_data": {"prompt_tokens": 32}}}, "prompt_tokens is 32, and a sequence has 32"),
    ],
)
def test_what_sizes_and_data_refuse_is_told_before_any_calibration(
    tied_llama: Path,
    story: Path,
    tmp_path: Path,
    cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    told: str,
) -> None:
    source = tmp_path / "source"
    shutil.copytree(tied_llama, source)
    (source / "optimizer").mkdir()
    save_file({"exp_avg.x": torch.zeros(1)}, source / "optimizer" / "adamw.safetensors", {"steps": "1"})
    monkeypatch.setattr("anysize.training.run._start", lambda *_, **__: pytest.fail("it was begun"))
    config = config_of(tied_llama, story, tmp_path / "out", **changes)
    del config["model"]
    sizes = changes.get("resize") or {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config["resize"] = {"source": str(source), "preset": "subspace", "calibration": {}, **sizes}
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert done.code == 2, done.err
    assert told in done.err
    assert not (tmp_path / "out").exists()


def test_when_to_measure_is_refused_without_anything_to_measure(
    llama: Path, story: Path, tmp_path: Path, cli: Run
) -> None:
    config = config_of(llama, story, tmp_path / "out")
    del config["data"]["validation"], config["training"]["eval_on_start"]
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert (done.code, "training.eval_steps: there are no held-out data" in done.err) == (2, True)
