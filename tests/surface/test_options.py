"""Every option changes the bytes, or the plan, or is refused: none is silently without effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.errors import InputError, SizeError

Run = Callable[..., Any]
Weights = Callable[[Path], dict[str, torch.Tensor]]

WIDER = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}
PRESETS = (
    "hypercloning", "hypercloning-noisy", "hypercloning-diagonal", "hypercloning-noisy-diagonal", "split", "fresh",
)  # fmt: skip
RANDOM = {"hypercloning-noisy", "hypercloning-noisy-diagonal", "split", "fresh"}


def made_from(source: Path, **options: Any) -> dict[str, torch.Tensor]:
    """The weights that a plan makes, in memory, without the proofs that other tests are about."""
    from anysize.executor import target_tensors
    from anysize.io.reader import Checkpoint

    return target_tensors(anysize.plan(source, **options), Checkpoint(source))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_each_preset_gives_different_bytes_and_the_same_bytes_again(llama: Path) -> None:
    made = {preset: made_from(llama, preset=preset, **WIDER) for preset in PRESETS}
    for preset, tensors in made.items():
        assert [other for other in PRESETS if same(tensors, made[other])] == [preset]
        assert same(tensors, made_from(llama, preset=preset, **WIDER))
    assert same(made["fresh"], made_from(llama, **WIDER))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_seed_changes_the_bytes_of_random_presets_only(llama: Path, preset: str) -> None:
    first, second = (made_from(llama, preset=preset, seed=seed, **WIDER) for seed in (0, 1))
    assert same(first, second) == (preset not in RANDOM)


@pytest.mark.parametrize("preset", ["hypercloning-noisy", "hypercloning-noisy-diagonal"])
def test_noise_db_sets_the_noise_of_noisy_presets(llama: Path, preset: str) -> None:
    clean = made_from(llama, preset=preset.replace("-noisy", ""), **WIDER)
    name = "model.layers.0.mlp.gate_proj.weight"
    noise = [
        float((made_from(llama, preset=preset, noise_db=db, **WIDER)[name] - clean[name]).square().mean().sqrt())
        for db in (0.0, 10.0, 20.0)
    ]
    assert noise[0] / noise[1] == pytest.approx(10**0.5, rel=1e-4)
    assert noise[1] / noise[2] == pytest.approx(10**0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"noise_db": 3.0}, "noise_db=3: the preset 'fresh' adds no noise, a noisy one does"),
        ({"noise_db": float("nan"), "preset": "hypercloning-noisy"}, "noise_db=nan: Input should be"),
        ({"noise_db": float("inf"), "preset": "hypercloning-noisy"}, "noise_db=inf: Input should be"),
        ({"seed": -1}, "seed=-1: Input should be greater than or equal to 0"),
        ({"dtype": "int8"}, "dtype='int8': Input should be 'keep', 'float32', 'bfloat16' or 'float16'"),
        ({"low_memory": True}, "low_memory: without calibration no model is run and nothing is fitted"),
        ({"untie": True}, "untie: the head of this model is not tied to its embedding"),
        ({"preset": "hyperclone"}, "unknown preset 'hyperclone' (did you mean 'hypercloning'?); known: auto, "),
        ({"scale": 2.0, "num_params": 10**6}, "scale and num_params both choose the sizes: give one of them"),
        ({"layers": "0-9", "num_hidden_layers": 4}, "layers '0-9': '0-9' does not lie in 0-1"),
        (
            {"layers": "both", "num_hidden_layers": 4},
            "layers 'both': 'both' is neither identity, interpose, stack, middle",
        ),
        ({"layers": "1-2"}, "layers '1-2': '1-2' does not lie in 0-1"),
    ],
)
def test_an_option_out_of_range_or_without_effect_is_refused(
    llama: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(SizeError) as refusal:
        anysize.plan(llama, hidden_size=64, **options)
    assert str(refusal.value).startswith(sentence)


def test_dtype_stores_every_tensor_and_says_so(llama: Path, tmp_path: Path, cli: Run, weights_of: Weights) -> None:
    sizes = ("--hidden-size", 48)
    kept = made_from(llama, hidden_size=48)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        ran = cli("resize", llama, tmp_path / name, *sizes, "--dtype", name, "--json")
        assert ran.code == 0, ran.err
        made = weights_of(tmp_path / name)
        assert {tensor.dtype for tensor in made.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
        assert made["lm_head.weight"][:, :32].equal(kept["lm_head.weight"][:, :32].to(dtype))
    assert "exact up to that rounding" in cli("plan", llama, *sizes, "--dtype", "float16").out


def test_dtype_alone_is_a_conversion(llama: Path, tmp_path: Path, cli: Run, weights_of: Weights) -> None:
    assert cli("resize", llama, tmp_path / "out", "--dtype", "bfloat16").code == 0
    before, after = weights_of(llama), weights_of(tmp_path / "out")
    assert all(after[name].equal(before[name].bfloat16()) for name in before)


def test_untie_gives_the_head_a_matrix_of_its_own(
    tied_llama: Path, tmp_path: Path, cli: Run, weights_of: Weights
) -> None:
    tied = cli("resize", tied_llama, tmp_path / "tied", "--hidden-size", 48)
    untied = cli("resize", tied_llama, tmp_path / "untied", "--hidden-size", 48, "--untie")
    assert (tied.code, untied.code) == (0, 0)
    names = [weights_of(tmp_path / which).keys() for which in ("tied", "untied")]
    assert names[1] - names[0] == {"lm_head.weight"}
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False
    assert cli("verify", tied_llama, tmp_path / "untied").code == 0


def test_padding_the_vocabulary_keeps_old_logits_and_is_said_not_exact(llama: Path, tmp_path: Path, cli: Run) -> None:
    ran = cli("resize", llama, tmp_path / "out", "--pad-vocab-to-multiple-of", 32, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["inexact_because"] == [
        "vocab_size 61 -> 64: old logits are kept, but the new tokens take probability from the old"
    ]
    logits = next(c for c in told["proof"]["checks"] if c["name"] == "logits")
    assert logits["measured"] < 1e-5
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 64


def test_keep_tokens_takes_the_other_rows_away(llama: Path, tmp_path: Path, cli: Run, weights_of: Weights) -> None:
    (tmp_path / "few.tokens").write_text("w5\nw9")
    ran = cli("resize", llama, tmp_path / "out", "--keep-tokens", tmp_path / "few.tokens", "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told["inexact_because"] == [
        "vocab_size 61 -> 5: the kept tokens' logits are kept, but share all the probability"
    ]
    before, after = weights_of(llama), weights_of(tmp_path / "out")
    assert after["lm_head.weight"].equal(before["lm_head.weight"][[0, 1, 2, 5, 9]])
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert tokenizer["model"]["vocab"] == {"<s>": 0, "</s>": 1, "<unk>": 2, "w5": 3, "w9": 4}


def test_vocab_size_says_how_many_tokens_of_a_text_are_kept(llama: Path, tmp_path: Path, cli: Run) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "text.txt").write_text("w7 w8 w8 w9 w9 w30")

    def kept(size: int) -> list[list[int]]:
        ran = cli("plan", llama, "--keep-tokens", tmp_path / "words", "--vocab-size", size, "--json")
        return json.loads(ran.out)["axes"]["vocab"]["runs"]

    always = [0, 3]
    assert kept(3) == [always]
    assert kept(5) == [always, [8, 2]]
    assert kept(6) == [always, [7, 3]]
    # What no text shows comes after what one shows, by id.
    assert kept(8) == [[0, 4], [7, 3], [30, 1]]


@pytest.mark.parametrize("option", ["--keep-tokens", "--calibration"])
def test_column_names_the_text_of_data_that_have_several(llama: Path, tmp_path: Path, cli: Run, option: str) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"title": f"w{3 + n % 5} " * 9, "story": f"w{10 + n % 30} w9 " * 9} for n in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = () if option == "--keep-tokens" else ("--intermediate-size", 13, "--preset", "subcloning")

    def planned(*column: object) -> Any:
        return cli("plan", llama, *sizes, option, data, *column, "--json")

    assert "name one with --column" in planned().err
    made = [json.loads(planned("--column", column).out) for column in ("title", "story")]
    assert made[0]["axes"] != made[1]["axes"]
    ran = cli("resize", llama, tmp_path / "out", *sizes, option, data, "--column", "story", "--plan-only", "--json")
    assert json.loads(ran.out)["axes"] == made[1]["axes"]


@pytest.mark.parametrize(
    "options", [{}, {"keep_tokens": ["w5"]}, {"keep_tokens": "few.tokens"}, {"calibration": "x.safetensors"}]
)
def test_a_column_of_no_data_is_refused(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.tokens").write_text("w5")
    with pytest.raises(InputError, match="column='story': neither calibration nor keep_tokens reads data here"):
        anysize.plan(llama, hidden_size=16, column="story", **options)


def test_scale_num_params_and_like_choose_the_sizes(llama: Path, new_llama: Run, tmp_path: Path, cli: Run) -> None:
    def sizes(*options: object) -> dict[str, int]:
        ran = cli("plan", llama, *options, "--json")
        assert ran.code == 0, ran.err
        return json.loads(ran.out)["target_config"]

    doubled = sizes("--scale", 2)
    assert {key: doubled[key] for key in WIDER} == WIDER
    other = new_llama(tmp_path / "other", hidden_size=40, intermediate_size=51, num_hidden_layers=3)
    alike = sizes("--like", other)
    assert (alike["hidden_size"], alike["intermediate_size"], alike["num_hidden_layers"]) == (40, 51, 3)
    # An explicit size goes before what a shortcut says.
    assert sizes("--like", other, "--hidden-size", 44)["hidden_size"] == 44
    planned = json.loads(cli("plan", llama, "--num-params", "0.1M", "--json").out)
    count = sum(torch.Size(recipe["shape"]).numel() for recipe in planned["recipes"])
    assert abs(count - 100_000) < 15_000


@pytest.mark.parametrize("pattern", ["interpose", "stack", "0-1,0-1,1", "identity"])
def test_layer_patterns_are_exact_only_as_identity(llama: Path, pattern: str, cli: Run) -> None:
    ran = cli("plan", llama, "--num-hidden-layers", 5, "--layers", pattern)
    assert ran.code == 0, ran.err
    assert ("exact: the target computes the same function" in ran.out) == (pattern == "identity")
    assert (f"not exact: layers {pattern}: the target runs layers" in ran.out) == (pattern != "identity")


@pytest.mark.parametrize("more", [(), ("--intermediate-size", 64), ("--scale", 2)])
def test_a_list_of_layers_sets_the_depth(llama: Path, tmp_path: Path, cli: Run, more: tuple[object, ...]) -> None:
    ran = cli("resize", llama, tmp_path / "out", "--layers", "0-1,1", *more)
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    refused = cli("plan", llama, "--layers", "0-1,1", "--num-hidden-layers", 4, *more)
    assert refused.code == 2
    assert "layers '0-1,1' lists 3 layers, but num_hidden_layers is 4" in refused.err


def test_a_list_of_layers_goes_before_the_depth_of_another_model(
    llama: Path, new_llama: Callable[..., Path], tmp_path: Path
) -> None:
    other = new_llama(tmp_path / "other", intermediate_size=51, num_hidden_layers=3)
    made = anysize.plan(llama, like=other, layers="1").target_config
    assert (made["intermediate_size"], made["num_hidden_layers"]) == (51, 1)


def test_layer_patterns_place_the_layers_they_name(llama: Path) -> None:
    source = made_from(llama, dtype="float32", vocab_size=61)
    for pattern, layers in {"interpose": [0, 0, 1, 1], "stack": [0, 1, 0, 1], "1,0,1,1": [1, 0, 1, 1]}.items():
        made = made_from(llama, num_hidden_layers=4, layers=pattern)
        for target, origin in enumerate(layers):
            for part in ("self_attn.o_proj", "mlp.up_proj", "input_layernorm"):
                wanted = source[f"model.layers.{origin}.{part}.weight"]
                assert made[f"model.layers.{target}.{part}.weight"].equal(wanted), (pattern, target)


def test_added_identity_layers_are_silent_copies(llama: Path) -> None:
    source = made_from(llama, vocab_size=61)
    made = made_from(llama, num_hidden_layers=4)
    for target, origin in enumerate([0, 0, 1, 1]):
        silent = target % 2 == 1
        for part, ends_branch in (("mlp.down_proj", True), ("self_attn.o_proj", True), ("mlp.up_proj", False)):
            tensor, wanted = (t[f"model.layers.{i}.{part}.weight"] for t, i in ((made, target), (source, origin)))
            assert tensor.equal(torch.zeros_like(wanted) if silent and ends_branch else wanted)
