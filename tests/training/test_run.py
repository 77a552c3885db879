"""Training runs: what they leave, how they resume, that two processes do what one does, and what stops them."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from anysize.calibration import calibrate
from anysize.cli.show_training import show_training
from anysize.progress import quiet
from anysize.training import trainer
from anysize.training.config import Resize, train_config
from anysize.training.distill import distilled
from anysize.training.loop import make_teacher
from anysize.training.run import _Folder, train
from anysize.training.start import StartFolder, plan_of
from anysize.training.trainer import Account, AnysizeTrainer, Teacher
from tests.conftest import Ran
from tests.training.runs import config_of, record, written

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def whole(llama: Path, story: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    place = tmp_path_factory.mktemp("whole")
    path = written(place / "c.yaml", config_of(llama, story, place / "out"))
    command = [sys.executable, "-m", "anysize", "train", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["finished"] is True
    return place / "out"


def test_a_run_leaves_a_plain_checkpoint_that_learned(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = record(whole)
    losses = [entry["validation"] for entry in found["curve"].values()]
    assert list(found["curve"]) == ["0", "4", "8", "12"]
    assert losses[-1] < losses[0] - 0.3
    assert (found["steps"], found["tokens"]) == (12, 12 * 4 * 32)
    model = AutoModelForCausalLM.from_pretrained(whole)
    ids = AutoTokenizer.from_pretrained(whole)("w3 w4", return_tensors="pt").input_ids
    assert bool(model(input_ids=ids).logits.isfinite().all())
    assert not list(whole.glob("*.bin"))
    card = (whole / "README.md").read_text()
    assert f"{losses[-1]:.4f}" in card
    assert "anysize train" in card


def test_a_run_without_held_out_data_tells_of_no_figures(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    data = {"train": str(story), "sequence_length": 32}
    training = {"max_steps": 2, "eval_on_start": False, "eval_strategy": "no"}
    config = config_of(llama, story, tmp_path / "out", data=data, training=training)
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert done.code == 0, done.err
    assert "held-out" not in (done.out + done.err).lower()
    assert "held-out" not in (tmp_path / "out" / "README.md").read_text().lower()


@pytest.mark.parametrize(("unit", "figure"), [("images", "error rate"), ("tokens", "loss")])
def test_what_was_measured_has_its_name(unit: str, figure: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"curve": {"4": {"validation": 0.25}}, "steps": 4, "tokens": 64, "train_s": 1.0, "unit": unit}
    show_training(found, "out", as_json=False)
    told = capsys.readouterr()
    assert f"held-out {figure}" in told.out + told.err


def test_a_finished_run_is_told_again_and_another_config_is_refused(
    whole: Path, llama: Path, story: Path, tmp_path: Path, cli: Run
) -> None:
    config = config_of(llama, story, whole)
    again = cli("train", written(tmp_path / "c.yaml", config), "--json")
    assert again.code == 0
    assert json.loads(again.out)["losses"] == record(whole)["losses"]
    before = (whole / "model.safetensors").stat().st_mtime_ns
    other = cli("train", written(tmp_path / "c.yaml", config), "--set", "training.learning_rate=1")
    assert other.code == 2
    assert "is of another config (training differ)" in other.err
    assert (whole / "model.safetensors").stat().st_mtime_ns == before


def test_a_killed_run_goes_on_to_the_same_weights(
    whole: Path, llama: Path, story: Path, tmp_path: Path, weights_of: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    output = tmp_path / "out"
    path = written(tmp_path / "c.yaml", config_of(llama, story, output))
    command = [sys.executable, "-m", "anysize", "train", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (output / "checkpoint-4" / "trainer_state.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not record(output)["finished"]
    # What a kill in the middle of saving leaves.
    (output / "checkpoint-11").mkdir(exist_ok=True)
    (output / "checkpoint-11" / "trainer_state.json").write_text('{"global_st')
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert record(output)["losses"] == record(whole)["losses"]
    one, other = weights_of(whole), weights_of(output)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_was_killed_after_its_last_step_takes_no_other(
    tmp_path: Path, llama: Path, story: Path, weights_of: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    output = tmp_path / "out"
    config = config_of(llama, story, output)
    train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    told, weights = record(output), weights_of(output)
    # As a kill between the last checkpoint and the record leaves it.
    (output / "anysize-train.json").write_text(json.dumps({**told, "finished": False}))
    (output / "model.safetensors").unlink()
    train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    assert (record(output)["steps"], record(output)["curve"]) == (12, told["curve"])
    again = weights_of(output)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not (output / "checkpoint-13").exists()


def test_a_run_goes_on_with_its_own_files_only(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    text, source = tmp_path / "text.txt", tmp_path / "source"
    shutil.copy(story, text)
    shutil.copytree(llama, source)
    config = config_of(source, text, tmp_path / "out", training={"max_steps": 2})
    path = written(tmp_path / "c.yaml", config)
    assert cli("train", path).code == 0
    text.write_text(text.read_text() + " w3")
    refused = cli("train", path)
    assert refused.code == 2
    assert "made of other files (data.train, data.validation changed since)" in refused.err
    shutil.copy(story, text)
    assert cli("train", path).code == 0
    for name, change in {"config.json": ('"vocab_size"', '"rope_theta": 77.0, "vocab_size"'),
                         "tokenizer.json": ('"w3"', '"was3"')}.items():  # fmt: skip
        place = source / name
        kept = place.read_text()
        place.write_text(kept.replace(*change))
        changed = cli("train", path)
        assert changed.code == 2
        assert "config or tokenizer of model" in changed.err
        place.write_text(kept)
    assert cli("train", path).code == 0


def test_a_run_that_diverged_at_its_end_is_refused_again(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    training = {"learning_rate": 1e30, "max_grad_norm": 0, "lr_scheduler_type": "constant", "warmup_steps": 0,
                "max_steps": 4, "logging_steps": 4}  # fmt: skip
    config = written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out", training=training))
    for _ in range(2):
        done = cli("train", config)
        assert done.code == 2
        assert "training diverged at step 4" in done.err
    assert not json.loads((tmp_path / "out" / "anysize-train.json").read_text())["finished"]


def test_the_best_checkpoint_is_that_of_the_validation_data(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    training = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "load_best_model_at_end": True}
    done = cli("train", written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out", training=training)))
    assert done.code == 0, done.err


def test_a_stream_that_is_too_short_is_refused(llama: Path, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5")
    config = {"output": str(tmp_path / "out"), "model": str(llama), "training": {"max_steps": 2},
              "data": {"train": str(tmp_path / "short.txt"), "sequence_length": 32, "streaming": True}}  # fmt: skip
    refused = cli("train", written(tmp_path / "c.yaml", config))
    assert refused.code == 2
    assert "too few for one sequence of 32" in refused.err
    assert not (tmp_path / "out").exists()


def test_targets_of_another_precision_are_not_taken_for_these(llama: Path, story: Path, tmp_path: Path) -> None:
    counts: list[int] = []
    for number, bf16 in enumerate((False, True, True)):
        raw = config_of(
            llama, story, tmp_path / str(number), resize={"source": str(llama), "intermediate_size": 96},
            distill={"weight": 0.5, "top_k": 3, "cache": str(tmp_path / "kept")},
            training={"max_steps": 1, "bf16": bf16, "use_cpu": True, "eval_on_start": False},
        )  # fmt: skip
        raw["model"] = ""
        train(train_config(raw, "c.yaml"), command="", origin="c.yaml", progress=quiet)
        counts.append(len(list((tmp_path / "kept").iterdir())))
    assert counts == [1, 2, 2]


def test_a_teacher_computes_as_its_student_does(llama: Path, story: Path, tmp_path: Path) -> None:
    """What accelerate has not prepared would stay in single precision, and be the dearer part of every step."""
    raw = config_of(
        llama, story, tmp_path / "out", resize={"source": str(llama), "intermediate_size": 96},
        distill={"weight": 0.5}, training={"max_steps": 1, "bf16": True, "use_cpu": True, "eval_on_start": False},
    )  # fmt: skip
    raw["model"] = ""
    heard: list[bool] = []

    def listening(*args: Any, **kwargs: Any) -> Any:
        made = make_teacher(*args, **kwargs)
        made.model.register_forward_hook(lambda *_: heard.append(torch.is_autocast_enabled("cpu")))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anysize.training.run.make_teacher", listening)
        train(train_config(raw, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    assert heard == [True]


def test_two_processes_do_what_one_does(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    # 22 sequences: an epoch ends after five steps and a part of one. 37 to measure, in batches of eight: the last ones
    # are filled up with copies.
    whole, few = tmp_path / "whole", {"max_tokens": 22 * 32, "evaluation_tokens": 37 * 32}
    config = config_of(llama, story, whole)
    config["data"] |= few
    train(train_config(config, "c.yaml"), command="", origin="c.yaml", progress=quiet)
    config = config_of(llama, story, tmp_path / "out", training={"per_device_train_batch_size": 2, "use_cpu": True})
    config["data"] |= few
    path = written(tmp_path / "c.yaml", config)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "anysize"]
    done = subprocess.run([*command, "train", str(path)], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = record(whole), record(tmp_path / "out")
    assert two["tokens"] == one["tokens"]
    assert two["examples_a_step"] == one["examples_a_step"] == 4
    # More of them would see other tokens a step: what is there, also where it is done, is another run.
    done = cli("train", path)
    assert done.code == 2
    assert "is of a run with 4 examples a step, and here are 2: start as many processes as then, or choose" in done.err
    assert record(tmp_path / "out") == two
    for step in one["curve"]:
        assert two["curve"][step]["validation"] == pytest.approx(one["curve"][step]["validation"], abs=1e-5)
    # The same losses, not merely similar ones: a run at another rate is far off.
    assert abs(one["curve"]["12"]["validation"] - one["curve"]["8"]["validation"]) > 0.02


def test_seconds_of_processors_add_up_and_are_taken_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "add_up", lambda tensors: [tensor.mul_(2) for tensor in tensors])
    account = Account(train_s=3.0, teacher_s=1.0, first_s=0.5)
    both = account.of_all(torch.device("cpu"))
    assert both == (6.0, 2.0, 1.0)
    # A clock is the same for all who look at it.
    assert account.of_all(torch.device("cuda")) == (3.0, 1.0, 0.5)
    account.save(tmp_path, *both)
    for rank, spent in (("0", 6.0), ("1", 0.0)):
        monkeypatch.setenv("RANK", rank)
        resumed = Account()
        resumed.restore(tmp_path)
        assert resumed.train_s == spent


def sharded(config: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "tests.training.sharded", "train", str(config)], capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_shards_of_a_plan_applied_on_the_fly_learn_what_whole_models_do(
    tied_llama: Path, story: Path, tmp_path: Path, cli: Run, weights_of: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    resize = {"source": str(tied_llama), "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
              "preset": "subspace", "calibration": {"tokens": 4096, "sequence_length": 64}}  # fmt: skip
    taught = {"resize": resize, "model": "", "distill": {"weight": 0.5, "hidden_weight": 0.1, "until_step": 8}}
    whole = config_of(tied_llama, story, tmp_path / "whole", **taught)
    assert cli("train", written(tmp_path / "whole.yaml", whole)).code == 0
    training = {
        "per_device_train_batch_size": 2,
        "fsdp": True,
        "fsdp_config": {
            "version": 2,
            # As `accelerate launch` has it: transformers itself would leave no model then.
            "state_dict_type": "SHARDED_STATE_DICT",
            "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
            "activation_checkpointing": True,
        },
    }
    path = written(tmp_path / "c.yaml", config_of(tied_llama, story, tmp_path / "out", training=training, **taught))
    sharded(path)
    one, two = record(tmp_path / "whole"), record(tmp_path / "out")
    for step in one["curve"]:
        assert two["curve"][step]["validation"] == pytest.approx(one["curve"][step]["validation"], abs=2e-3)
    assert abs(one["curve"]["12"]["validation"] - one["curve"]["8"]["validation"]) > 0.02
    # It was sharded: accelerate keeps the shards of each checkpoint then.
    assert list((tmp_path / "out" / "checkpoint-12" / "pytorch_model_fsdp_0").glob("*.distcp"))
    # Nothing but weights lies beside a config: loaders take every such file for them.
    wholes, gathered, before = (weights_of(tmp_path / place) for place in ("whole", "out", "whole/start/model"))
    assert gathered.keys() == wholes.keys()
    assert "lm_head.weight" not in gathered
    # As a kill after the eighth step leaves it, the shards of weights and optimizer go on from there.
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    for name in ("model.safetensors", "README.md"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / "anysize-train.json").write_text(json.dumps(two | {"finished": False}))
    kept = tmp_path / "out" / "checkpoint-8" / "trainer_state.json"
    before_that = kept.stat().st_mtime_ns
    sharded(path)
    assert kept.stat().st_mtime_ns == before_that, "it began anew"
    assert record(tmp_path / "out")["curve"] == two["curve"]
    again = weights_of(tmp_path / "out")
    assert all(torch.equal(again[name], gathered[name]) for name in gathered)
    # AdamW lets single elements with hardly any gradient go astray; all together moved by a hundred times as much.
    for name, tensor in wholes.items():
        assert (gathered[name] - tensor).abs().mean() < 0.01 * (tensor - before[name]).abs().mean()


def test_a_plan_is_applied_on_the_fly_and_its_source_teaches(
    llama: Path, story: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[int, float]] = []
    shares: list[float] = []
    mixed = AnysizeTrainer._with_teacher

    def counted(self: AnysizeTrainer, teacher: Teacher, share: float, *arguments: Any) -> torch.Tensor:
        heard.append((self.state.global_step, share))
        return mixed(self, teacher, share, *arguments)

    def weighed(plain: torch.Tensor, kl: torch.Tensor, weight: float, temperature: float) -> torch.Tensor:
        shares.append(weight)
        return distilled(plain, kl, weight, temperature)

    monkeypatch.setattr(AnysizeTrainer, "_with_teacher", counted)
    monkeypatch.setattr(trainer, "distilled", weighed)
    # A teacher is known by where it lies, however the config names it.
    monkeypatch.chdir(llama.parent)
    resize = {"source": llama.name, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1,
              "preset": "subspace", "calibration": {"tokens": 4096, "sequence_length": 64}}  # fmt: skip
    distill = {"weight": 0.5, "temperature": 2.0, "until_step": 0.5, "fade_steps": 2, "top_k": 8, "hidden_weight": 0.1}
    config = {**config_of(llama, story, tmp_path / "out"), "resize": resize, "distill": distill, "model": ""}
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert done.code == 0, done.err
    found = record(tmp_path / "out")
    assert heard == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1), (5, 0.5)]
    assert shares == [0.5 * share for _, share in heard]
    assert found["teacher_s"] > 0
    assert found["calibration_s"] > 0
    losses = [entry["validation"] for entry in found["curve"].values()]
    assert losses[-1] < losses[0]
    assert "preset `subspace`" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "asked",
    [
        {"preset": "weight-selection", "intermediate_size": 24},
        {"hidden_size": 24, "num_key_value_heads": 7},
        {"num_hidden_layers": 1, "layers": "0,1"},
    ],
)
def test_a_start_that_cannot_be_is_refused_before_it_is_calibrated(
    llama: Path, story: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise AssertionError("the source was run")

    monkeypatch.setattr(calibrate, "calibrated", run)
    resize = {"source": str(llama), "calibration": {"tokens": 4096}, **asked}
    config = {**config_of(llama, story, tmp_path / "out"), "model": "", "resize": resize}
    done = cli("train", written(tmp_path / "c.yaml", config))
    assert done.code == 2, done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "layers"),
    [
        ({"preset": "hypercloning-noisy", "noise_db": 5.0, "hidden_size": 64}, 2),
        ({"preset": "subspace", "num_hidden_layers": 1, "layers": "evolutionary", "search_tokens": 5}, 1),
        ({"preset": "subcloning", "num_hidden_layers": 1, "layers": "block-influence"}, 1),
        ({"num_hidden_layers": 2, "layers": "1,0"}, 2),
    ],
)
def test_sizes_are_planned_without_what_needs_data(llama: Path, asked: dict[str, Any], layers: int) -> None:
    resize = Resize(source=str(llama), **asked)
    plan = plan_of(resize.sizes_alone(), None, lambda *_: None)
    assert plan.target_config["num_hidden_layers"] == layers
    assert plan.target_config["hidden_size"] == asked.get("hidden_size", 32)


def test_a_folder_with_something_else_is_refused(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    done = cli("train", written(tmp_path / "c.yaml", config_of(llama, story, tmp_path / "out")))
    assert done.code == 2
    assert "holds no run" in done.err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["letter.txt"]


def test_two_processes_do_not_train_in_one_folder(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    output = tmp_path / "out"
    path = written(tmp_path / "c.yaml", config_of(llama, story, output))
    first = _Folder(train_config(yaml.safe_load(path.read_text()), "c.yaml"), 4)
    assert first.claim() is None
    done = cli("train", path)
    assert done.code == 2
    assert "another process is at work in" in done.err
    assert sorted(p.name for p in output.iterdir()) == [".lock", "anysize-train.json"]
    first.release()
    assert [p.name for p in output.iterdir()] == ["anysize-train.json"]


@pytest.mark.parametrize(("world", "kept"), [("1", False), ("2", True)])
def test_a_start_that_another_process_may_be_reading_stays(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str, kept: bool
) -> None:
    resize = {"source": str(llama), "intermediate_size": 96}
    config = train_config({**config_of(llama, story, tmp_path / "out", resize=resize), "model": ""}, "c.yaml")
    folder = _Folder(config, 4)
    assert folder.claim() is None
    place = StartFolder(tmp_path / "out" / "start")
    place.write(Resize(**resize), None, time.process_time, quiet, "")
    monkeypatch.setenv("WORLD_SIZE", world)
    folder.withdraw(refused=True)
    folder.release()
    assert place.is_whole is kept


def test_a_random_start_needs_no_weights(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    blank = tmp_path / "blank"
    blank.mkdir()
    for path in llama.iterdir():
        if path.suffix != ".safetensors":
            (blank / path.name).write_bytes(path.read_bytes())
    config = config_of(llama, story, tmp_path / "out", random=str(blank), training={"max_steps": 4})
    config.pop("model")
    path = written(tmp_path / "c.yaml", config)
    assert cli("train", path, "--plan-only").code == 0
    done = cli("train", path)
    assert done.code == 0, done.err
    assert record(tmp_path / "out")["curve"]["4"]["validation"] < record(tmp_path / "out")["curve"]["0"]["validation"]
    refused = cli("train", path, "--set", f"model={blank}", "--set", "random=''", "--set", f"output={tmp_path / 'no'}")
    assert refused.code == 2
    assert "has no model.safetensors" in refused.err


def test_a_share_of_a_warm_up_is_of_the_steps_that_the_run_has(llama: Path, story: Path, tmp_path: Path) -> None:
    curves: list[Any] = []
    for name, warmup in (("share", 0.5), ("steps", 6), ("none", 0)):
        raw = config_of(
            llama, story, tmp_path / name, resize={"source": str(llama), "intermediate_size": 96, "preset": "fresh"},
            recipe={"new_parameters": {"old_warmup_steps": warmup}},
        )  # fmt: skip
        raw["model"] = ""
        train(train_config(raw, "c.yaml"), command="", origin="c.yaml", progress=quiet)
        curves.append(record(tmp_path / name)["curve"])
    assert curves[0] == curves[1] != curves[2]
