"""Draft models: what a check gives, a perfect draft and a useless one, and the command from end to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from anysize.errors import InputError
from anysize.evals import drafting
from anysize.evals.drafting import checks_of, measure_drafting
from anysize.io import whole
from anysize.progress import quiet
from anysize.training import draft
from anysize.training.config import Data, Distill, Resize, TrainConfig
from anysize.training.start import load
from tests.conftest import Ran


@pytest.mark.parametrize(
    ("agree", "drafted", "wanted"),
    [
        # (checks, tokens proposed, taken, given)
        ("11111111" + "111", 3, (2, 6, 6, 8)),
        ("00000000" + "000", 3, (8, 24, 0, 8)),
        ("10101010" + "101", 3, (4, 12, 4, 8)),
        ("11101110" + "111", 3, (2, 6, 6, 8)),
        ("11101110" + "1", 1, (4, 4, 4, 8)),
        # The last check goes on past the text, as far as what is proposed.
        ("1" * 20 + "11111", 5, (4, 20, 20, 24)),
        ("1" * 20 + "00000", 5, (4, 20, 17, 21)),
        ("1" + "01111", 5, (1, 5, 1, 2)),
    ],
)
def test_a_check_takes_what_agrees_and_gives_one_more(agree: str, drafted: int, wanted: tuple[int, ...]) -> None:
    source = torch.zeros(len(agree), dtype=torch.long)
    assert checks_of(source, 1 - torch.tensor([int(a) for a in agree]), drafted) == wanted


def test_a_source_is_its_own_perfect_draft_and_another_model_is_not(llama: Path, new_llama: Callable[..., Path],
                                                                    tmp_path: Path) -> None:  # fmt: skip
    source, twin = (load(str(llama), torch.float32) for _ in range(2))
    other = load(str(new_llama(tmp_path / "other", seed=7)), torch.float32)
    prompts = torch.arange(3, 33).reshape(3, 10)
    # 20 tokens: three checks of six, and one that goes on past them.
    perfect = measure_drafting(source, twin, prompts, new_tokens=20, num_drafted=5)
    assert (perfect.acceptance_rate, perfect.agreement, perfect.tokens_a_check) == (1.0, 1.0, 6.0)
    assert perfect.same_text
    assert (perfect.num_prompts, perfect.num_tokens) == (3, 60)
    useless = measure_drafting(source, other, prompts, new_tokens=12, num_drafted=3)
    # Most of what is proposed comes after a token that was refused.
    assert useless.acceptance_rate <= useless.agreement < 0.5
    assert useless.tokens_a_check == pytest.approx(1 + 3 * useless.acceptance_rate)
    assert useless.tokens_a_check < 2
    assert useless.same_text


def test_what_a_generation_config_asks_for_is_left_out_and_comes_back(llama: Path) -> None:
    source, twin = (load(str(llama), torch.float32) for _ in range(2))
    prompts = torch.arange(3, 23).reshape(2, 10)
    plain = measure_drafting(source, twin, prompts, new_tokens=12, num_drafted=3)
    asked: Any = source.generation_config
    asked.repetition_penalty, asked.no_repeat_ngram_size, asked.suppress_tokens = 1.8, 2, list(range(3, 30))
    twin.generation_config.eos_token_id = list(range(30, 61))
    before = source.generation_config, twin.generation_config, asked.to_dict(), twin.generation_config.to_dict()
    found = measure_drafting(source, twin, prompts, new_tokens=12, num_drafted=3)
    assert (found.agreement, found.acceptance_rate, found.same_text) == (1.0, 1.0, True)
    assert found.tokens_a_check == plain.tokens_a_check
    assert (source.generation_config, twin.generation_config) == before[:2]
    assert (asked.to_dict(), twin.generation_config.to_dict()) == before[2:]


def test_the_draft_reads_one_prompt_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, twin = (load(str(llama), torch.float32) for _ in range(2))
    sizes, forward = set[int](), twin.forward

    def seen(*inputs: Any, **named: Any) -> Any:
        sizes.add(len(named["input_ids"]))
        return forward(*inputs, **named)

    monkeypatch.setattr(twin, "forward", seen)
    measure_drafting(source, twin, torch.arange(3, 33).reshape(3, 10), new_tokens=4, num_drafted=2)
    assert sizes == {1}


def test_a_draft_of_another_vocabulary_is_refused(llama: Path, new_llama: Callable[..., Path], tmp_path: Path) -> None:
    models = [load(str(place), torch.float32) for place in (llama, new_llama(tmp_path / "other", vocab_size=47))]
    with pytest.raises(InputError, match="has 61 tokens and the draft 47"):
        measure_drafting(models[0], models[1], torch.ones(1, 4, dtype=torch.long), new_tokens=2)


def test_the_command_makes_teaches_and_measures(
    llama: Path, story: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    asked = ("draft", llama, tmp_path / "out", "--data", story, "--held-out", story, "--num-hidden-layers", 1,
             "--steps", 4, "--batch-size", 4, "--sequence-length", 32, "--prompts", 2, "--new-tokens", 8)  # fmt: skip
    done = cli(*asked, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["drafting"]["num_tokens"] == 16
    assert 0 <= found["drafting"]["acceptance_rate"] <= 1
    assert found["drafting"]["same_text"] is True
    kept = json.loads((tmp_path / "out" / "anysize-draft.json").read_text())
    assert kept == {"source": str(llama), **found["drafting"]}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| acceptance rate, share of the proposed tokens | {found['drafting']['acceptance_rate']:.3f} |" in card
    # What others write into it stays.
    (tmp_path / "out" / "README.md").write_text(f"{card}\n## Mine\n")
    assert cli(*asked[:-1], 9).code == 0
    again = (tmp_path / "out" / "README.md").read_text()
    assert "18 tokens, 5 proposed at a time" in again
    assert again.count("## As a draft") == 1
    assert again.startswith(card.partition("## As a draft")[0])
    assert again.endswith("\n## Mine\n")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    refused = cli(*asked[:-1], 200)
    assert refused.code == 2
    assert "the source has positions for 128" in refused.err


def test_there_are_as_many_prompts_as_asked_for_while_the_text_is_long_enough(
    llama: Path, story: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = TrainConfig(
        output=str(tmp_path / "out"), resize=Resize(source=str(llama), num_hidden_layers=1),
        data=Data(train=str(story), validation=str(story), sequence_length=32, evaluation_tokens=64),
        distill=Distill(weight=1.0),
    )  # fmt: skip
    read = list[torch.Tensor]()

    def trained(config: TrainConfig, **_told: Any) -> dict[str, Any]:
        assert config == asked
        return {}

    def loaded(_place: str, dtype: torch.dtype) -> torch.nn.Module:
        return torch.nn.Linear(1, 1, dtype=dtype)

    def measured(_source: Any, _draft: Any, prompts: torch.Tensor, **_told: Any) -> Any:
        read.append(prompts)

    for name, stand_in in (("train", trained), ("load", loaded), ("measure_drafting", measured)):
        monkeypatch.setattr(draft, name, stand_in)
    for count in (1, 9, 1000):
        draft.make_draft(asked, num_prompts=count, new_tokens=2, num_drafted=2, command="", progress=quiet)
    # The story has 12,000 words, which are a token each, and an end.
    assert [tuple(prompts.shape) for prompts in read] == [(1, 16), (9, 16), (12_001 // 32, 16)]
    # Of several that train together the first one measures.
    monkeypatch.setenv("RANK", "1")
    assert draft.make_draft(asked, num_prompts=1, new_tokens=2, num_drafted=2, command="", progress=quiet) is None
    assert len(read) == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--held-out", ""), "--held-out is empty"),
        (("--scale", "nan"), "resize.scale"),
        (("--learning-rate", "inf"), "training.learning_rate"),
    ],
)
def test_what_no_draft_can_be_made_of_is_refused_before_anything_is_made(
    llama: Path, story: Path, tmp_path: Path, cli: Callable[..., Any], options: tuple[str, str], told: str
) -> None:
    asked = {"--data": story, "--held-out": story, "--scale": 0.5, "--steps": 2} | dict([options])
    done = cli("draft", llama, tmp_path / "out", *(part for option in asked.items() for part in option))
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


DRAFTED = drafting.Drafting(
    num_prompts=2, num_tokens=16, num_drafted=5, acceptance_rate=0.25, agreement=0.5, tokens_a_check=2.25, source_s=2.0,
    pair_s=1.0, speedup=2.0, same_text=True,
)  # fmt: skip


def test_the_command_shows_first_and_says_where_the_text_was_too_short(
    llama: Path, story: Path, tmp_path: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_contents: object) -> None:
        raise OSError(28, "No space left on device")

    def made(_asked: TrainConfig, **_told: Any) -> Any:
        return {}, DRAFTED

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    monkeypatch.setattr(draft, "make_draft", made)
    asked = ("draft", llama, tmp_path / "out", "--data", story, "--held-out", story, "--prompts")
    ran = cli(*asked, 3)
    assert ran.code == 0, ran.err
    shown = {line[: line.rindex("  ")].strip(): line.split()[-1] for line in ran.out.splitlines() if "  " in line}
    assert shown["taken, share of the proposed tokens"] == "0.250"
    assert shown["agreement with the source, share of all tokens"] == "0.500"
    assert "note: the held-out text gave 2 prompts of the 3 asked for" in ran.out.splitlines()
    assert "note:" not in cli(*asked, 2).out
    with monkeypatch.context() as context:
        context.setattr(draft, "make_draft", lambda _asked, **_told: None)
        assert cli(*asked, 2) == Ran(0, "", "")
    monkeypatch.setattr(whole, "write_whole", full)
    ran = cli(*asked, 2)
    assert (ran.code, "No space left on device" in ran.err) == (2, True)
    assert "0.250" in ran.out
