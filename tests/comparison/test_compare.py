"""Comparisons end to end: arms over the same tokens, resumed where they stopped, refused where they make no sense."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import anysize
from anysize.cli.show_training import show_comparison
from anysize.comparison import compare as engine
from anysize.comparison.compare import compare
from anysize.comparison.config import compare_config
from anysize.comparison.flops import conversion_flops
from anysize.comparison.folder import Place, claimed
from anysize.comparison.job import Job, arguments_of, in_small
from anysize.config import understand
from anysize.errors import InputError, OutputError
from anysize.flops import forward_flops
from anysize.io.lock import FolderLock
from anysize.io.reader import Checkpoint
from anysize.report.schema import Results
from tests.comparison.runs import carried_out, config_of
from tests.conftest import Ran

Run = Callable[..., Ran]


@pytest.mark.usefixtures("in_this_process")
def test_a_comparison_tells_everything_and_goes_on_where_it_stopped(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A weight that is the default all the same: what was asked for is told.
    asked = {"preset": "subspace", "distill": {"weight": 0.9}}
    config = config_of(llama, story, tmp_path / "out", arms={"random": {"random": True}, "subspace": asked})
    found = carried_out(config)
    assert found.complete
    assert {arm.name: arm.settings for arm in found.arms} == config["arms"]
    assert Results.load(tmp_path / "out") == found
    assert [row.arm for row in found.rows] == ["random", "subspace"]
    # A trial of both rates, and the best with both seeds.
    assert sorted(r.status for r in found.runs) == ["finished"] * 4 + ["trial"] * 4
    assert {r.at[-1] for r in found.runs if r.status == "trial"} == {2}
    assert {r.at[-1] for r in found.runs if r.status == "finished"} == {8}
    ours, random = found.arm("subspace"), found.arm("random")
    assert ours.plan is not None
    assert ours.calibration_s > 0
    assert ours.conversion_s > 0
    assert (random.calibration_s, random.conversion_s, random.teacher_flops_a_token) == (0, 0, 0)
    assert ours.teacher_flops_a_token == forward_flops(understand(Checkpoint(llama).config), 32)
    assert ours.num_parameters == random.num_parameters
    assert {"kv"} <= {kept.axis for kept in ours.plan.kept}
    assert len(ours.plan.directions) == 16
    # The source's weights are random and large: it is no better than a fresh model, and what is cut out of it likewise.
    assert found.source is not None
    assert 3 < found.source.test < 9
    assert any("smallest" in note or "largest" in note for note in found.notes)
    assert not list((tmp_path / "out").glob("runs/*/checkpoint-*"))

    # Nothing is trained twice: not after a stop, not when an arm with the same settings is added under another name.
    lost = next(
        p for p in (tmp_path / "out" / "runs").iterdir() if json.loads((p / "run.json").read_text())["seed"] == 1
    )
    (lost / "run.json").unlink()
    trained: list[tuple[str, int]] = []
    monkeypatch.setattr(
        engine, "carry_out", lambda job, do=engine.carry_out: (trained.append((job.arm, job.seed)), do(job))[1]
    )
    again = carried_out({**config, "arms": {**config["arms"], "twin": config["arms"]["subspace"]}})
    assert len(trained) == 1
    assert trained[0][1] == 1
    losses = {row.arm: row.after_of_seeds for row in again.rows}
    assert losses["twin"] == losses["subspace"] == {row.arm: row.after_of_seeds for row in found.rows}["subspace"]


def test_processes_find_what_one_process_finds(llama: Path, story: Path, tmp_path: Path, cli: Run) -> None:
    arms = {"random": {"random": True}}
    changes: dict[str, Any] = {
        "arms": arms,
        "seeds": [0],
        "workers": 2,
        "learning_rates": [1e-3, 2e-3],
        "halving": False,
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config_of(llama, story, tmp_path / "out", **changes)))
    done = cli("compare", path)
    assert done.code == 0, done.err
    assert "anysize report" in done.out
    found = Results.load(tmp_path / "out")
    assert found.arms[0].name == "random"
    assert len(found.runs) == 2
    assert all(run.status == "finished" for run in found.runs)
    assert found.config == path.read_text()


@pytest.mark.usefixtures("in_this_process")
def test_an_arm_that_asks_more_of_its_scores_can_be_added(llama: Path, story: Path, tmp_path: Path) -> None:
    arms: dict[str, Any] = {"random": {"random": True}, "influence": {"preset": "subcloning", "layers": "angular"}}
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "training": {"max_steps": 2},
                               "target": {"num_hidden_layers": 1}}  # fmt: skip
    before = carried_out(config_of(llama, story, tmp_path / "out", arms=arms, **changes))
    arms["loss"] = {"preset": "subcloning", "layers": "leave-one-out"}
    after = carried_out(config_of(llama, story, tmp_path / "out", arms=arms, **changes))
    assert [row.arm for row in after.rows] == ["random", "influence", "loss"]
    assert after.rows[:2] == before.rows
    # What only one of them asked for is paid by it alone.
    assert after.arm("influence") == before.arm("influence")
    assert after.arm("loss").calibration_flops > after.arm("influence").calibration_flops
    assert "--leave-one-out" in after.arm("loss").command
    assert "--tokenizer" not in after.arm("loss").command


@pytest.mark.usefixtures("in_this_process")
def test_the_command_of_an_arm_names_the_tokenizer_that_it_was_calibrated_with(
    llama: Path, story: Path, tmp_path: Path
) -> None:
    config = config_of(llama, story, tmp_path / "out", seeds=[0], learning_rates=[1e-3], training={"max_steps": 2})
    config["data"]["tokenizer"] = str(llama)
    assert f"--tokenizer {llama}" in carried_out(config).arm("subspace").command


@pytest.mark.usefixtures("in_this_process")
def test_only_arms_that_read_scores_pay_for_them(llama: Path, story: Path, tmp_path: Path) -> None:
    arms = {
        "random": {"random": True},
        "stride": {"preset": "weight-selection"},
        "by weight": {"preset": "subcloning", "select": "weight", "readers": "fan-in"},
        "subcloning": {"preset": "subcloning"},
    }
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "training": {"max_steps": 2}}
    found = carried_out(config_of(llama, story, tmp_path / "out", arms=arms, **changes))
    assert {arm.name for arm in found.arms if arm.calibration_s > 0} == {"subcloning"}
    del arms["subcloning"]
    found = carried_out(config_of(llama, story, tmp_path / "without", arms=arms, **changes))
    assert len(found.rows) == 3
    assert not (tmp_path / "without" / "scores").exists()


@pytest.mark.usefixtures("in_this_process")
def test_a_diverging_arm_is_marked_and_the_others_go_on(
    llama: Path, story: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {
        "random": {"random": True},
        "wild": {"random": True, "learning_rates": [1e30], "training": {"max_grad_norm": 0}},
    }
    config = config_of(llama, story, tmp_path / "out", arms=arms, seeds=[0], learning_rates=[1e-3])
    found = carried_out(config)
    assert [row.arm for row in found.rows] == ["random"]
    assert {run.arm: run.status for run in found.runs} == {"random": "finished", "wild": "diverged"}
    assert "1 run of 'wild' diverged (at 1e+30): losses were not finite" in found.notes
    show_comparison(found, tmp_path / "out" / "results.json", as_json=False)
    told = capsys.readouterr().out
    assert [line.split()[:4] for line in told.splitlines() if "wild" in line and "finished" in line] == [
        ["wild", "no", "finished", "run"]
    ]


@pytest.mark.usefixtures("in_this_process")
def test_a_comparison_that_shows_nothing_about_growing_says_so(llama: Path, story: Path, tmp_path: Path) -> None:
    from anysize.io.models import new_model

    young = tmp_path / "young"
    shutil.copytree(llama, young)
    new_model("LlamaForCausalLM", json.loads((llama / "config.json").read_text()), torch.float32).save_pretrained(young)
    arms = {"random": {"random": True}, "fresh": {"preset": "fresh"}}
    changes = {"arms": arms, "seeds": [0], "learning_rates": [1e-9], "target": {"intermediate_size": 64}}
    found = carried_out(config_of(young, story, tmp_path / "out", **changes))
    assert any("shows nothing about growing" in note for note in found.notes)
    # A source that an arm has for itself is measured as well: one that is worse than any start.
    worse = tmp_path / "worse"
    shutil.copytree(young, worse)
    tensors = {name: 30 * tensor for name, tensor in load_file(worse / "model.safetensors").items()}
    save_file(tensors, worse / "model.safetensors", {"format": "pt"})
    arms["of its own"] = {"preset": "fresh", "source": str(worse)}
    notes = [
        note for note in carried_out(config_of(young, story, tmp_path / "out", **changes)).notes if "nothing" in note
    ]
    assert [f"growing '{young}'" in note for note in notes] == [True]
    assert found.arm("fresh").plan is not None
    assert found.arm("fresh").plan.exact  # type: ignore[union-attr]
    assert found.arm("fresh").calibration_s == 0


@pytest.mark.usefixtures("in_this_process")
def test_an_arm_whose_own_source_has_changed_is_trained_again(
    llama: Path, new_llama: Callable[..., Path], story: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    arms = {"random": {"random": True}, "ours": {"preset": "weight-selection"},
            "theirs": {"preset": "subcloning", "source": str(other)}}  # fmt: skip
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "training": {"max_steps": 2}}
    config = config_of(llama, story, tmp_path / "out", arms=arms, **changes)
    before = {row.arm: row for row in carried_out(config).rows}
    new = new_llama(tmp_path / "new", seed=5)
    shutil.copy(new / "model.safetensors", other / "model.safetensors")
    after = {row.arm: row for row in carried_out(config).rows}
    assert after["ours"] == before["ours"]
    assert after["theirs"].before != before["theirs"].before
    # Its scores and its start are those of the new weights.
    assert len(list((tmp_path / "out" / "scores").glob("*.safetensors"))) == 2
    fresh = carried_out({**config, "output": str(tmp_path / "fresh")})
    assert {row.arm: row.after_of_seeds for row in fresh.rows} == {
        arm: row.after_of_seeds for arm, row in after.items()
    }


def test_each_arm_pays_for_its_own_source() -> None:
    far = {"source": "far", "source_cost": {"train_s": 7.0}}
    arms = {
        "random": {"random": True}, "taught": {"random": True, "distill": {}}, "ours": {},
        "by another": {"distill": {"teacher": "elsewhere"}}, "far": far, "unknown": {"source": "unknown"},
        "far, taught by near": {**far, "distill": {}}, "far, taught by itself": {**far, "distill": {"teacher": "far"}},
        "named": {"source": "s"},
    }  # fmt: skip
    config = compare_config(
        config_of(Path("s"), Path("t"), Path("o"), arms=arms, source_cost={"train_s": 50.0}), "c.yaml"
    )
    assert {name: config.source_cost_of(name).train_s for name in arms} == {
        "random": 0, "taught": 50, "ours": 50, "by another": None, "far": 7, "unknown": None,
        "far, taught by near": 57, "far, taught by itself": 7, "named": 50,
    }  # fmt: skip
    with pytest.raises(InputError, match="without a source of its own"):
        compare_config({**config_of(Path("s"), Path("t"), Path("o")), "arms": {"a": {"source_cost": {}}}}, "c.yaml")


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("changed", ["calibration", "like", "config", "tokenizer"])
def test_what_else_starts_are_made_of_may_not_change(
    llama: Path, story: Path, tmp_path: Path, changed: str, new_llama: Callable[..., Path]
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(story.read_text())
    changes: dict[str, Any] = {"seeds": [0], "learning_rates": [1e-3], "training": {"max_steps": 2}}
    if changed == "calibration":
        changes["calibration"] = {"data": str(own), "tokens": 2048, "sequence_length": 64}
    elif changed == "like":
        new_llama(tmp_path / "like", num_hidden_layers=1)
        changes["target"] = {"like": str(tmp_path / "like")}
    source = shutil.copytree(llama, tmp_path / "source")
    config = config_of(source, story, tmp_path / "out", **changes)
    carried_out(config)
    if changed == "config":
        told = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**told, "rope_theta": 77.0}))
    elif changed == "tokenizer":
        told = (source / "tokenizer.json").read_text()
        (source / "tokenizer.json").write_text(told.replace('"w3"', '"was3"'))
    elif changed == "calibration":
        own.write_text(story.read_text() + " w3")
    else:
        shutil.rmtree(tmp_path / "like")
        new_llama(tmp_path / "like", num_hidden_layers=1, intermediate_size=20)
    with pytest.raises(InputError, match="holds another comparison"):
        carried_out(config)


@pytest.mark.usefixtures("in_this_process")
def test_a_schedule_that_follows_what_is_measured_can_be_had(llama: Path, story: Path, tmp_path: Path) -> None:
    arms = {"random": {"random": True, "training": {"lr_scheduler_type": "reduce_lr_on_plateau"}}}
    found = carried_out(config_of(llama, story, tmp_path / "out", arms=arms, seeds=[0], learning_rates=[1e-3]))
    assert [row.arm for row in found.rows] == ["random"]


@pytest.mark.parametrize("spelled", [dict, json.dumps])
def test_the_schedule_of_a_trial_is_that_of_the_run_in_small(
    llama: Path, story: Path, tmp_path: Path, spelled: Callable[[dict[str, Any]], Any]
) -> None:
    training = {
        "max_steps": 80, "warmup_steps": 8, "lr_scheduler_type": "warmup_stable_decay",
        "lr_scheduler_kwargs": spelled({"num_decay_steps": 40, "min_lr_ratio": 0.1}),
    }  # fmt: skip
    asked = compare_config(config_of(llama, story, tmp_path / "out", training=training), "c.yaml")
    place = Place(tmp_path / "out", "identity", {})
    whole, trial = (arguments_of(Job(place, asked, "random", 1e-3, 0, steps)) for steps in (80, 20))
    assert (whole.warmup_steps, whole.lr_scheduler_kwargs["num_decay_steps"]) == (8, 40)
    assert (trial.warmup_steps, trial.lr_scheduler_kwargs["num_decay_steps"]) == (2, 10)
    assert trial.lr_scheduler_kwargs["min_lr_ratio"] == 0.1
    written = {"max_steps": 80, "warmup_steps": 1e1}
    asked = compare_config(config_of(llama, story, tmp_path / "out", training=written), "c.yaml")
    assert arguments_of(Job(place, asked, "random", 1e-3, 0, 20)).get_warmup_steps(20) == 2


@pytest.mark.parametrize(("steps", "every"), [(80, 20), (7, 1), (9, 2), (3, 1)])
def test_a_run_is_measured_as_often_as_is_asked_for_at_least(
    llama: Path, story: Path, tmp_path: Path, steps: int, every: int
) -> None:
    asked = compare_config(config_of(llama, story, tmp_path / "out", training={"max_steps": steps}), "c.yaml")
    args = arguments_of(Job(Place(tmp_path / "out", "identity", {}), asked, "random", 1e-3, 0, steps))
    assert args.eval_steps == args.logging_steps == every
    assert steps // every >= min(asked.evaluations, steps)


@pytest.mark.parametrize(("until", "fading"), [(40, 20), (0.5, 0.25)])
def test_a_trial_is_taught_like_the_run_in_small(
    llama: Path, story: Path, tmp_path: Path, until: float, fading: float
) -> None:
    arm = {"distill": {"until_step": until, "fade_steps": fading}}
    config = config_of(llama, story, tmp_path / "out", training={"max_steps": 80}, goals=["ours"], arms={"ours": arm})
    asked = compare_config(config, "c.yaml")
    place = Place(tmp_path / "out", "identity", {})
    whole, trial = (in_small(Job(place, asked, "ours", 1e-3, 0, steps)).distill for steps in (80, 20))
    assert whole is not None
    assert trial is not None
    shares = [whole.share(step, 80) for step in range(80)]
    assert [trial.share(step, 20) for step in range(20)] == pytest.approx(shares[::4])


def test_what_follows_the_target_is_counted(llama: Path) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    text = llama.parent / "follow.txt"
    text.write_text(" ".join(f"w{3 + i % 50}" for i in range(40_000)))
    scores = anysize.calibrate(llama, text, sequence_length=64, tokens=8192)
    with FlopCounterMode(display=False) as counter:
        plan = anysize.plan(llama, calibration=scores, hidden_size=16)
    assert plan.options.readers == "sequential"
    source, target = understand(plan.source_config), understand(plan.target_config)
    counted = conversion_flops(source, target, plan.options, scores.record.tokens, 64)
    # Beside the models' passes are the products that the fits are made of.
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.65)
    assert counted < counter.get_total_flops() * 1.2
    plain = plan.options.model_copy(update={"readers": "least-squares"})
    assert conversion_flops(source, target, plain, scores.record.tokens, 64) == 0
    searched = plain.model_copy(update={"layers": "evolutionary", "search_tokens": 1000})
    assert conversion_flops(source, target, searched, 8192, 64) == 1000 * forward_flops(source, 64)


def test_one_process_at_a_time_works_in_a_folder(llama: Path, story: Path, tmp_path: Path) -> None:
    raw = config_of(llama, story, tmp_path / "out")
    config = compare_config(raw, "c.yaml")
    (tmp_path / "out").mkdir()
    claimed(config, Checkpoint(llama).identity, {}, {}, "of the processor")
    before = sorted(p.name for p in (tmp_path / "out").iterdir())
    with FolderLock(tmp_path / "out"), pytest.raises(OutputError, match="another process is at work in"):
        compare(config, text="", command="", progress=lambda *_: None)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == before


def test_seconds_of_two_kinds_are_not_mixed(llama: Path, story: Path, tmp_path: Path) -> None:
    config = compare_config(config_of(llama, story, tmp_path / "out"), "c.yaml")
    (tmp_path / "out").mkdir()
    found = [claimed(config, "identity", {}, {}, "of the processor").identity for _ in range(2)]
    with pytest.raises(InputError, match="timed by seconds of the processor, and here they are of the clock on X:"):
        claimed(config, "identity", {}, {}, "of the clock on X")
    # Folders from before it was kept, and what their runs are known by, stay as they are.
    record = tmp_path / "out" / "comparison.json"
    kept = json.loads(record.read_text())
    assert kept.pop("seconds") == "of the processor"
    record.write_text(json.dumps(kept))
    assert claimed(config, "identity", {}, {}, "of the processor").identity == found[0] == found[1]


def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    script = tmp_path / "begin.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from anysize.comparison.workers import enter\n"
        "if __name__ == '__main__':\n"
        "    context = multiprocessing.get_context('spawn')\n"
        "    pool = ProcessPoolExecutor(1, context, enter, (context.Value('i', 0), 0))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    began = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert began.stdout is not None
    worker = psutil.Process(int(began.stdout.readline()))
    assert worker.is_running()
    began.kill()
    began.wait()
    began.stdout.close()
    worker.wait(timeout=60)
