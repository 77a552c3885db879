"""Config files: everything that is not understood is refused by name, and numbers are what people mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anysize.comparison.config import compare_config
from anysize.errors import InputError
from anysize.training.argument_values import unread_optim_args
from anysize.training.arguments import fixed_arguments, training_arguments, with_defaults
from anysize.training.config import train_config
from anysize.training.config_file import overridden, read_yaml, spelled

TRAIN: dict[str, Any] = {"output": "out", "model": "m", "data": {"train": "t"}}
COMPARE: dict[str, Any] = {
    "output": "out", "source": "s", "target": {"scale": 0.5}, "data": {"train": "t", "validation": "v"},
    "training": {"max_steps": 10}, "learning_rates": [1e-3], "arms": {"random": {"random": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"outptu": "x"}, "unknown key 'outptu' (did you mean 'output'?)"),
        ({"data": {"train": "t", "colum": "x"}}, "unknown key 'data.colum' (did you mean 'column'?)"),
        ({"data": {}}, "'data.train' is missing"),
        ({"data": {"train": "t", "sequence_length": 1}}, "data.sequence_length"),
        ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat' (did you mean 'learning_rate'?)"),
        ({"training": {"output_dir": "x"}}, "'training.output_dir' is told by output"),
        ({"random": "x"}, "exactly one of model, random and resize, got model; random"),
        ({"model": ""}, "exactly one of model, random and resize, got none"),
        ({"distill": {"weight": 0.5}}, "distill.teacher: only a resize has a source to distil from"),
        ({"distill": {"teacher": "x", "weight": 1.5}}, "distill.weight"),
        ({"distill": {"teacher": "x", "cache": "c"}}, "cache keeps top-k targets, and the words of"),
        ({"distill": {"teacher": "x", "temperature": float("nan")}}, "distill.temperature"),
        ({"recipe": {"learning_rate_factors": {"norms": 2}}}, "unknown role 'norms' (did you mean 'norm'?)"),
        ({"recipe": {"learning_rate_factors": {"norm": -1}}}, "wanted 0 or more"),
        ({"recipe": {"new_parameters": {"warmup": 3}}}, "unknown key 'recipe.new_parameters.warmup'"),
        (
            {"model": "", "resize": {"source": "s", "calibration": {"tokns": 5}}},
            "cannot be used: unknown key 'resize.calibration.tokns' (did you mean 'tokens'?)",
        ),
        ({"model": "", "resize": {"source": "s", "calibration": 5}}, "resize.calibration: Input should be"),
    ],
)
def test_what_a_training_config_refuses(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError) as error:
        train_config({**TRAIN, **changes}, "c.yaml")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arms": {}}, "arms"),
        ({"goals": ["rando"]}, "there is no arm 'rando' (did you mean 'random'?)"),
        ({"goals": []}, None),
        ({"training": {}}, "training.max_steps is None"),
        ({"training": {"max_steps": 10, "seed": 3}}, "training.seed: told by seeds"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [1e-3, 1e-3]}, "a learning rate stands twice"),
        ({"learning_rates": [0.0]}, "wanted more than 0"),
        ({"seeds": [1, 1]}, "seeds: one stands twice"),
        ({"data": {"train": "t"}}, "data.validation is missing"),
        ({"data": {"train": "t", "validation": "v", "streaming": True}}, "every arm has to see the same tokens"),
        ({"arms": {"random": {"random": True, "preset": "fresh"}}}, "a random start takes no preset"),
        ({"arms": {"random": {"random": True, "training": {"seed": 1}}}}, "training.seed: told by seeds"),
        ({"arms": {"random": {"random": True, "training": {"use_cpu": True}}}}, "training.use_cpu: all arms share it"),
        ({"arms": {"random": {"random": True, "training": {"eval_on_start": False}}}}, "told by evaluations"),
        ({"training": {"max_steps": 1, "auto_find_batch_size": True}}, "auto_find_batch_size: told by per_device"),
        ({"arms": {"random": {"random": True, "distill": {"hidden_weight": 1}}}}, "a random start has none"),
        ({"arms": {"random": {"random": True, "recipe": {"new_parameters": {}}}}}, "all values of a random start"),
        ({"arms": {"random": {"source": "z", "distill": {"hidden_weight": 1}}}}, "the writer maps are of 'z'"),
        ({"arms": {"random": {"source": "z", "distill": {"hidden_weight": 1, "teacher": "z"}}}, "goals": ()}, None),
        ({"arms": {"random": {"randm": True}}}, "unknown key 'arms.random.randm' (did you mean 'random'?)"),
        ({"arms": {"random": {}, "o": {"distill": {"wieght": 1}}}}, "'arms.o.distill.wieght' (did you mean 'weight'?)"),
        (
            {"arms": {"random": {"training": {"max_steps": -1}}}},
            "training.max_steps is -1: wanted how many steps it",
        ),
        ({"arms": {"random": {"training": {"max_steps": "abc"}}}}, "arms.random.training.max_steps is 'abc'"),
        ({"arms": {"random": {"random": True, "training": {"weight_deca": 1}}}}, "did you mean 'weight_decay'?"),
        (
            {"training": {"max_steps": 8, "weight_decay": "x"}, "arms": {"random": {"training": {"adam_beta1": 2}}}},
            "training.weight_decay is 'x': wanted a number of 0 or more; arms.random.training.adam_beta1 is 2: wanted",
        ),
        ({"training": {"max_steps": 8, "per_device_train_batch_size": None}}, "training.per_device_train_batch_size"),
        ({"target": {"hiden_size": 3}}, "unknown key 'target.hiden_size' (did you mean 'hidden_size'?)"),
    ],
)
def test_what_a_comparison_refuses(changes: dict[str, Any], told: str | None) -> None:
    if told is None:
        assert compare_config({**COMPARE, **changes}, "c.yaml").goals == ()
        return
    with pytest.raises(InputError) as error:
        compare_config({**COMPARE, **changes}, "c.yaml")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("learning_rate", -1, "a number of 0 or more"),
        ("learning_rate", "abc", "a number of 0 or more"),
        ("learning_rate", float("nan"), "a number of 0 or more"),
        ("learning_rate", float("inf"), "a number of 0 or more"),
        ("max_steps", None, "a whole number of 1 or more, or -1 where num_train_epochs tells"),
        ("max_steps", "10", "a whole number"),
        ("max_steps", 2.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("max_steps", 0, "a whole number of 1 or more"),
        ("per_device_train_batch_size", 0, "a whole number of 1 or more"),
        ("per_device_eval_batch_size", 0, "a whole number of 1 or more"),
        ("gradient_accumulation_steps", 0, "a whole number of 1 or more"),
        ("max_grad_norm", "x", "a number of 0 or more"),
        ("adam_beta1", 2, "a number of 0 or more and below 1"),
        ("adam_epsilon", 0, "a number above 0"),
        ("weight_decay", -5, "a number of 0 or more"),
        ("warmup_steps", 2.5, "a number of whole steps, or a share of the run below 1"),
        ("bf16", "false", "true or false"),
        ("seed", -1, "a whole number of 0 or more and below 2**32"),
        ("eval_accumulation_steps", 0, "a whole number of 1 or more, or null"),
        ("log_level", "loud", "one of detail, debug, info, warning, error, critical, passive"),
    ],
)
def test_a_value_that_no_run_could_have_is_refused(name: str, value: object, wanted: str) -> None:
    with pytest.raises(InputError) as error:
        train_config({**TRAIN, "training": {name: value}}, "c.yaml")
    assert f"training.{name} is {value!r}: wanted {wanted}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("learning_rate", "1e-3"), ("learning_rate", "1"), ("learning_rate", "0"), ("max_steps", "-1"),
     ("warmup_steps", "0.05"), ("warmup_steps", "10"), ("warmup_steps", "1e2"), ("eval_steps", "1e3"),
     ("eval_steps", "null"), ("max_grad_norm", ".inf"), ("tf32", "true"), ("save_total_limit", "null"),
     ("optim_args", "a=1"), ("lr_scheduler_kwargs", "{min_lr_rate: 0.1}"), ("report_to", "[none]"),
     ("lr_scheduler_type", "linear"), ("log_level", "info"), ("fsdp", "full_shard"), ("fsdp", "true")],
)  # fmt: skip
def test_values_as_people_write_them_are_taken(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"{name}: {text}\n")
    given = read_yaml(path)
    assert train_config({**TRAIN, "training": given}, "c.yaml").training == given


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        train_config({**TRAIN, "a": 1, "data": {"train": "t", "b": 2}, "output": 3}, "c.yaml")
    assert all(word in str(error.value) for word in ("'a'", "'data.b'", "output", "c.yaml"))
    with pytest.raises(InputError) as error:
        train_config({**TRAIN, "training": {"bf16": 1, "max_step": 5, "weight_decay": -1}}, "c.yaml")
    told = "unknown key 'training.max_step' (did you mean 'max_steps'?); training.bf16 is 1: wanted true or false; "
    assert f"{told}training.weight_decay is -1: wanted a number of 0 or more" in str(error.value)


def test_numbers_in_yaml_are_what_people_mean(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: 1e-3\nb: 10\nc: 350M\nd: 1.5E+2\ne: -.5\n")
    assert read_yaml(path) == {"a": 0.001, "b": 10, "c": "350M", "d": 150.0, "e": -0.5}
    assert isinstance(read_yaml(path)["b"], int)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [1", "is not YAML"),
        ("- 1", "holds no keys"),
        ("", "holds no keys"),
        ("a: 1\na: 2", "a stands twice"),
        ("b:\n  c: 1\n  c: 2", "c stands twice"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=told):
        read_yaml(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the config"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides_change_one_key_and_leave_the_rest() -> None:
    raw = {"training": {"a": 1, "b": 2}, "c": 3}
    assert overridden(raw, ["training.a=1e-3", "d.e=x"]) == {"training": {"a": 0.001, "b": 2}, "c": 3, "d": {"e": "x"}}
    assert raw == {"training": {"a": 1, "b": 2}, "c": 3}
    for wrong in ("training.a", "=3", "c.x=1"):
        with pytest.raises(InputError, match="--set"):
            overridden(raw, [wrong])


def test_a_config_is_spelled_as_it_reads(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(spelled(COMPARE))
    assert read_yaml(path) == COMPARE


def test_arms_may_share_what_they_have_in_common(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("a: &a {preset: fresh, seed: 1}\nb: {<<: *a, seed: 2}\n")
    assert read_yaml(path) == {"a": {"preset": "fresh", "seed": 1}, "b": {"preset": "fresh", "seed": 2}}
    path.write_text("a: &a {preset: fresh}\nb: {<<: *a, seed: 2, seed: 3}\n")
    with pytest.raises(InputError, match="seed stands twice"):
        read_yaml(path)


def test_an_override_that_is_no_yaml_is_refused() -> None:
    with pytest.raises(InputError, match=r"--set training.report_to=\[tensorboard: the value is not YAML"):
        overridden({}, ["training.report_to=[tensorboard"])


def test_our_own_scheduler_written_out_is_the_same() -> None:
    assert with_defaults({"lr_scheduler_type": "cosine_with_min_lr"}) == with_defaults({})
    assert "lr_scheduler_kwargs" not in with_defaults({"lr_scheduler_type": "linear"})


@pytest.mark.parametrize(
    ("optim", "given"),
    [("sgd", "momentum=0.9,dampening=0.0, nesterov=true"),
     ("adagrad", "lr_decay=0.25,eps=0.125"),
     ("rmsprop", "momentum=0.5,alpha=0.25,eps=0.125,centered=true")],
)  # fmt: skip
def test_what_optimizers_take_is_what_transformers_hands_them(tmp_path: Path, optim: str, given: str) -> None:
    from transformers import Trainer

    assert unread_optim_args(optim, given) == []
    args = training_arguments({"optim": optim, "optim_args": given, **fixed_arguments(str(tmp_path))}, "c.yaml")
    handed = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    assert handed.keys() - {"lr"} == {pair.split("=")[0].strip() for pair in given.split(",")}
    # Every group of parameters has its own by then.
    assert "'weight_decay'" in unread_optim_args(optim, f"{given},weight_decay=0.5")[0]
    # What is of a package of its own is for that to refuse.
    assert unread_optim_args("galore_adamw", "rank=8") == []
    assert "'rank'" in unread_optim_args(optim, f"{given},rank=8")[0]
