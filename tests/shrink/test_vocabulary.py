"""A cut vocabulary: the kept tokens' logits and texts are the source's, under new ids, in every file."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import anysize
from anysize.api import apply_with_proof
from anysize.axis import select
from anysize.calibration.data import DataOptions, documents, token_batches, tokenizer_of
from anysize.config import understand
from anysize.errors import CheckpointError, ProofError, SizeError
from anysize.executor import target_tensors
from anysize.io.models import build_model, quiet_transformers
from anysize.io.reader import Checkpoint
from anysize.planner import make_plan
from anysize.proof.parity import load
from anysize.proof.replan import differences
from anysize.proof.whole import _planned
from anysize.recipe import Options, Plan
from anysize.vocabulary.ids import new_ids
from anysize.vocabulary.keep import KeptTokens
from anysize.vocabulary.tokenizer_file import TokenizerFile, cut_tokenizer
from tests import tiny
from tests.speaking import (
    BYTES,
    END,
    PAD,
    PAGE,
    SIZE,
    SPECIAL,
    START,
    VOCAB,
    WORDS,
    byte_level,
    in_memory,
    kept_of,
    make_speaking,
    written,
)

Run = Callable[..., Any]
Weights = Callable[[Path], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def cut(speaking: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama with a few words kept."""
    output = tmp_path_factory.mktemp("cut") / "out"
    anysize.resize(speaking, output, keep_tokens=WORDS)
    return output


def names_of(plan: Plan) -> set[str]:
    names = {i: token for token, i in VOCAB.items()}
    return {names[i] for i in kept_of(plan)}


def test_the_listed_tokens_stay_with_their_parts_the_bytes_and_the_special_ones(speaking: Path) -> None:
    kept = names_of(anysize.plan(speaking, keep_tokens=["Ġlooked"]))
    longer = {token for token in kept if len(token) > 1} - set(SPECIAL)
    # "Ġlooked" is merged from pieces, all of them pieces of itself.
    assert "Ġlooked" in longer
    assert len(longer) > 1
    assert all(token in "Ġlooked" for token in longer)
    assert set(SPECIAL) <= kept
    assert len([token for token in kept if len(token) == 1]) == BYTES
    assert "Ġcat" not in kept


def test_rows_of_kept_tokens_are_the_source_s(speaking: Path, cut: Path, weights_of: Weights) -> None:
    before, after = weights_of(speaking), weights_of(cut)
    kept = torch.tensor(kept_of(anysize.plan(speaking, keep_tokens=WORDS)))
    for name, values in before.items():
        wanted = values[kept] if name in ("model.embed_tokens.weight", "lm_head.weight") else values
        assert after[name].equal(wanted), name


def test_every_file_speaks_of_the_new_ids_and_none_of_the_old(speaking: Path, cut: Path) -> None:
    new = new_ids(select(SIZE + 3, kept_of(anysize.plan(speaking, keep_tokens=WORDS))))
    ids = {"bos_token_id": new[START], "eos_token_id": [new[END], new[PAD]], "pad_token_id": new[PAD]}

    def told(name: str) -> dict[str, Any]:
        return json.loads((cut / name).read_text())

    config = told("config.json")
    assert {key: config[key] for key in ids} == ids
    assert config["vocab_size"] == len(new)
    assert told("generation_config.json") == {
        **ids, "suppress_tokens": [new[VOCAB["Ġcat"]], new[END]],
        "bad_words_ids": [[new[VOCAB["Ġcat"]]], [new[0], new[END]]],
    }  # fmt: skip
    assert list(told("tokenizer_config.json")["added_tokens_decoder"]) == [str(new[SIZE + i]) for i in range(3)]
    assert told("tokenizer_config.json")["chat_template"] == "{{ messages }}"
    assert told("added_tokens.json") == {token: new[SIZE + i] for i, token in enumerate(SPECIAL)}
    tokenizer = told("tokenizer.json")
    assert tokenizer["post_processor"]["special_tokens"]["<start>"]["ids"] == [new[START]]
    assert tokenizer["padding"]["pad_id"] == new[PAD]
    assert {token["content"]: token["id"] for token in tokenizer["added_tokens"]} == told("added_tokens.json")
    assert not {"vocab.json", "merges.txt", "tokenizer.model"} & {path.name for path in cut.iterdir()}
    assert (cut / "LICENSE").read_text() == "free"


def test_the_target_reads_and_writes_as_the_source(speaking: Path, cut: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (speaking, cut)]
    with quiet_transformers():
        models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (speaking, cut)]
    text = "the cat looked the cat"
    ids = [t(text, return_tensors="pt").input_ids for t in tokenizers]
    tokens = [t.convert_ids_to_tokens(i[0].tolist()) for t, i in zip(tokenizers, ids, strict=True)]
    assert tokens[0] == tokens[1]
    kept = torch.tensor(kept_of(anysize.plan(speaking, keep_tokens=WORDS)))
    with torch.no_grad():
        wanted, got = (model(i).logits for model, i in zip(models, ids, strict=True))
    assert got.equal(wanted[..., kept])
    assert not got.equal(wanted[..., kept - 1])
    # What was cut is spelled in smaller pieces, and nothing is lost.
    odd = "Then chased: Zürich 東京 🙂\n"
    spelled = [t.tokenize(odd) for t in tokenizers]
    assert len(spelled[1]) > len(spelled[0])
    assert [t.decode(t(odd, add_special_tokens=False).input_ids) for t in tokenizers] == [odd, odd]


def test_a_greedy_text_of_kept_tokens_is_the_source_s(speaking: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def told(folder: Path) -> list[str]:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(folder, generation_config=None).eval()
        model.generation_config.suppress_tokens = model.generation_config.bad_words_ids = None
        ids = tokenizer("The cat", return_tensors="pt").input_ids
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        return tokenizer.convert_ids_to_tokens(made[0].tolist())

    wanted = told(speaking)
    anysize.resize(speaking, tmp_path / "out", keep_tokens=wanted)
    assert told(tmp_path / "out") == wanted


def test_lists_in_every_form_are_the_same_choice(speaking: Path, tmp_path: Path, cli: Run) -> None:
    ids = [VOCAB[token] for token in WORDS]
    forms: list[Any] = [ids, tuple(WORDS), set(ids), written(tmp_path, "ids.json", ids), torch.tensor(ids).numpy(),
                        str(written(tmp_path, "words.json", WORDS)),
                        written(tmp_path, "words.tokens", "\n".join([*WORDS, ""]))]  # fmt: skip
    plans = {anysize.plan(speaking, keep_tokens=form).to_json() for form in (WORDS, *forms)}
    assert len(plans) == 1
    told = cli("plan", speaking, "--keep-tokens", tmp_path / "words.tokens", "--json")
    assert json.loads(told.out) == json.loads(plans.pop())
    assert anysize.plan(speaking, keep_tokens=WORDS[:2]).axes != anysize.plan(speaking, keep_tokens=WORDS).axes


def seen_in(path: Path) -> Counter[str]:
    return Counter(token for text in documents(str(path)) for token in byte_level().encode(text).tokens)


def test_the_tokens_of_a_text_stay(speaking: Path, page: Path) -> None:
    plan = anysize.plan(speaking, keep_tokens=page)
    kept = names_of(plan)
    seen = set(seen_in(page)) - {"<start>"}
    assert seen <= kept
    extra = {token for token in kept - seen if len(token) > 1} - set(SPECIAL)
    assert all(any(token in other for other in seen) for token in extra)
    always = BYTES + len(SPECIAL) - len([token for token in seen if len(token) == 1])
    assert plan.notes[0].startswith(f"tokens: {len(kept)} of {SIZE + 3} are kept: {len(seen)} seen in ")
    assert f"{always} more that are always kept, {len(extra)} more that they are made of" in plan.notes[0]


def test_vocab_size_keeps_exactly_so_many_of_the_most_frequent(speaking: Path, page: Path) -> None:
    counts = seen_in(page)
    sizes = range(BYTES + 3, SIZE, 7)
    chosen = [names_of(anysize.plan(speaking, keep_tokens=page, vocab_size=size)) for size in sizes]
    assert [len(names) for names in chosen] == list(sizes)
    assert all(few < many for few, many in itertools.pairwise(chosen))
    # The first words to come are the most frequent whose pieces are there, and the last are of no use to the text.
    first = {token for token in chosen[1] if len(token) > 1} - set(SPECIAL)
    cost = {t: {p for p in byte_level_parts(t) if len(p) > 1} for t in counts if len(t) > 1 and t not in SPECIAL}
    common = max(cost, key=lambda t: (counts[t], -VOCAB[t]))
    assert cost[common] <= first
    everything = {token for token in cost if counts[token]}
    assert everything <= chosen[-1]


def byte_level_parts(token: str) -> set[str]:
    file = TokenizerFile(byte_level().to_str(), "it")
    return {file.names[i] for i in file.parts(VOCAB[token])}


def test_tokens_that_no_text_shows_come_last_and_by_id(speaking: Path, page: Path) -> None:
    all_seen = kept_of(anysize.plan(speaking, keep_tokens=page))
    more = kept_of(anysize.plan(speaking, keep_tokens=page, vocab_size=len(all_seen) + 3))
    unseen = sorted(set(range(SIZE)) - set(all_seen))
    assert set(more) - set(all_seen) == set(unseen[:3])


def test_a_folder_of_text_and_a_table_are_read_whole(speaking: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    written(folder, "a.txt", "the cat")
    written(folder, "b.jsonl", '{"text": "looked at"}\n{"text": "the hat"}\n')
    kept = names_of(anysize.plan(speaking, keep_tokens=folder))
    assert {"Ġcat", "Ġat", "Ġhat"} <= kept
    assert "Ġthen" not in kept


def test_a_plan_on_paper_gives_the_same_bytes(speaking: Path, cut: Path, tmp_path: Path) -> None:
    plan = anysize.plan(speaking, keep_tokens=WORDS)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    anysize.apply(again, tmp_path / "out")
    names = {path.name for path in cut.iterdir()} - {"anysize.json", "README.md"}
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (cut / name).read_bytes(), name


def test_everything_shrinks_and_grows_in_one_plan(speaking: Path, page: Path, tmp_path: Path) -> None:
    scores = anysize.calibrate(speaking, written(tmp_path, "long.txt", PAGE * 40), sequence_length=64)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 96}
    plan = anysize.plan(speaking, keep_tokens=page, calibration=scores, **sizes)
    assert [reason.partition(" ")[0] for reason in plan.inexact] == ["layers", "hidden", "vocab_size"]
    assert not plan.keeps_logits
    output, proof = apply_with_proof(plan, tmp_path / "out")
    assert proof.passed
    assert {"tokenizer", "cut vocab", "turn hidden"} <= {check.name for check in proof.checks}
    assert anysize.verify(speaking, output).passed


def test_tokens_that_only_the_loaded_tokenizer_has_are_left_out(speaking: Path, page: Path, tmp_path: Path) -> None:
    shutil.copytree(speaking, tmp_path / "more")
    place = tmp_path / "more" / "tokenizer_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "additional_special_tokens": ["<more>"]}))
    assert len(tokenizer_of(str(tmp_path / "more"))) == SIZE + 4
    scores = anysize.calibrate(tmp_path / "more", written(tmp_path, "long.txt", PAGE * 40), sequence_length=64)
    plan = anysize.plan(tmp_path / "more", keep_tokens=page, calibration=scores, hidden_size=16)
    assert plan.options.readers == "sequential"
    assert anysize.apply(plan, tmp_path / "out").is_dir()  # type: ignore[union-attr]


def test_growing_with_fewer_tokens_keeps_their_logits(speaking: Path, tmp_path: Path, cli: Run) -> None:
    plan = anysize.plan(speaking, keep_tokens=WORDS, hidden_size=48, num_hidden_layers=3)
    assert not plan.exact
    assert plan.keeps_logits
    output, proof = apply_with_proof(plan, tmp_path / "out", verify="full")
    measured = {check.name: check for check in proof.checks}
    assert measured["logits"].required
    assert measured["logits"].passed
    assert measured["greedy"].measured == 0
    assert cli("verify", speaking, output).code == 0


SPOILT: dict[str, Callable[[Any], object]] = {
    "the embedding one row on": lambda m: rolled(m.model.embed_tokens),
    "the head one row on": lambda m: rolled(m.lm_head),
    "two rows of the head swapped": lambda m: swapped(m.lm_head),
}


def rolled(module: Any) -> None:
    module.weight.data = module.weight.data.roll(1, 0)


def swapped(module: Any) -> None:
    module.weight.data[[7, 8]] = module.weight.data[[8, 7]]


@pytest.mark.parametrize("name", [None, *SPOILT])
def test_a_row_in_the_wrong_place_is_seen(speaking: Path, cut: Path, name: str | None) -> None:
    plan = anysize.plan(speaking, keep_tokens=WORDS)
    target = load(cut, plan.model_class)
    if name is not None:
        SPOILT[name](target)
    proof = _planned(plan, load(speaking, plan.model_class), target, torch.float32).run(full=True)
    failed = {check.name for check in proof.checks if not check.passed}
    assert ("logits" in failed) == (name is not None)
    assert proof.passed == (name is None)


def test_a_wrong_factor_fails_the_comparison(speaking: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = anysize.plan(speaking, keep_tokens=WORDS)
    wrong = tuple(r.model_copy(update={"factor": 1.5}) if r.name == "lm_head.weight" else r for r in plan.recipes)
    monkeypatch.setattr("anysize.proof.replan.differences", lambda *_: [])
    with pytest.raises(ProofError, match="failed"):
        anysize.apply(plan.model_copy(update={"recipes": wrong}))


def test_a_tokenizer_that_says_something_else_is_not_written(
    speaking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TokenizerFile.cut

    def wrong(file: TokenizerFile, new: dict[int, int]) -> str:
        one, other = VOCAB["Ġcat"], VOCAB["Ġthe"]
        return right(file, {**new, one: new[other], other: new[one]})

    plan = anysize.plan(speaking, keep_tokens=WORDS)
    monkeypatch.setattr(TokenizerFile, "cut", wrong)
    with pytest.raises(ProofError, match="the proof of the tokenizer failed"):
        anysize.apply(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


EDITS: dict[str, tuple[Callable[[list[int]], Iterable[int]], str]] = {
    "a byte": (lambda kept: [i for i in kept if i != 65], "the kept tokens lack 65, which the tokenizer cannot miss"),
    "an end token": (lambda kept: [i for i in kept if i != END], f"the kept tokens lack {END}, which"),
    "another order": (lambda kept: kept[::-1], "are not in ascending order, each of them once"),
    "one twice": (lambda kept: [kept[0], *kept[:-1]], "are not in ascending order, each of them once"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_choice_is_refused(speaking: Path, tmp_path: Path, name: str) -> None:
    plan = anysize.plan(speaking, keep_tokens=WORDS)
    assert differences(plan, Checkpoint(speaking)) == []
    edit, why = EDITS[name]
    index = list(edit(kept_of(plan)))
    edited = plan.model_copy(update={"axes": {**plan.axes, "vocab": select(SIZE + 3, index)}})
    with pytest.raises(ProofError, match=f"plan|{why}"):
        anysize.apply(edited, tmp_path / "out", verify="off")
    assert any(why in found for found in differences(edited, Checkpoint(speaking)))


def test_a_tokenizer_that_changed_since_the_plan_is_named(tmp_path: Path, new_llama: Run) -> None:
    source = make_speaking(tmp_path / "source", new_llama)
    plan = anysize.plan(source, keep_tokens=WORDS)
    (source / "tokenizer.json").write_text((source / "tokenizer.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="is not the source this plan was made for: its tokenizer changed"):
        anysize.apply(plan, tmp_path / "out")


def test_verify_needs_the_plan_where_tokens_are_missing(speaking: Path, cut: Path, tmp_path: Path, cli: Run) -> None:
    import shutil

    assert anysize.verify(speaking, cut).passed
    shutil.copytree(cut, tmp_path / "bare")
    (tmp_path / "bare" / "anysize.json").unlink()
    ran = cli("verify", speaking, tmp_path / "bare")
    assert ran.code == 2
    assert "no plan of anysize beside it says which are which" in ran.err


TEXT = [variant for variant in tiny.VARIANTS if variant.family != "vit"]


@pytest.mark.parametrize("variant", TEXT, ids=str)
def test_every_family_keeps_the_kept_tokens_logits(variant: tiny.Variant) -> None:
    source = tiny.source(variant, dtype=torch.float32)
    kept = torch.tensor([i for i in range(tiny.VOCAB) if i % 3 != 2])
    tokens = KeptTokens(select(tiny.VOCAB, kept.tolist()), "")
    plan = make_plan(source, {"vocab_size": len(kept)}, Options(), tokens=tokens)
    made = target_tensors(plan, source)
    ids = torch.randint(0, len(kept), (2, 17), generator=torch.Generator().manual_seed(1))
    before = {name: source.read(name) for name in source.tensors}
    wanted = tiny.logits(dict(source.config), before, {"input_ids": kept[ids]})
    got = tiny.logits(plan.target_config, made, {"input_ids": ids})
    assert got.equal(wanted[..., kept])
    assert not got.equal(tiny.logits(dict(source.config), before, {"input_ids": ids})[..., kept])


def test_a_model_in_memory_takes_ids_and_tells_the_new_ones(speaking: Path) -> None:
    source = in_memory(speaking)
    asked = [3, 300, 7]
    plan = anysize.plan(source, keep_tokens=asked)
    assert plan.kept_tokens is not None
    index = plan.kept_tokens.index
    # Without a tokenizer nothing is known to be needed but what the configs name.
    assert index.tolist() == [3, 7, 300, PAD, START, END]
    made: Any = anysize.apply(plan, source=source)
    ids = torch.tensor([[0, 2, 1, 5]])
    with torch.no_grad():
        wanted = source(torch.from_numpy(index)[ids]).logits[..., torch.from_numpy(index)]
        # A product of fewer rows may be added up in another order.
        assert torch.allclose(made(ids).logits, wanted, atol=1e-5)
    assert (made.config.pad_token_id, made.generation_config.eos_token_id) == (3, [5, 3])
    assert source.generation_config.eos_token_id == [END, PAD]
    again: Any = anysize.resize(source, keep_tokens=asked)
    assert again.lm_head.weight.equal(made.lm_head.weight)


def test_a_model_in_memory_is_written_with_the_new_ids(speaking: Path, tmp_path: Path) -> None:
    anysize.resize(in_memory(speaking), tmp_path / "out", keep_tokens=[3, 7])
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["pad_token_id"] == 2
    assert not list((tmp_path / "out").glob("tokenizer*"))


def test_readers_are_fitted_to_what_the_cut_tokenizer_says(
    speaking: Path, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path, "long.txt", PAGE * 40)
    scores = anysize.calibrate(speaking, text, sequence_length=64)
    options: Any = {"keep_tokens": page, "hidden_size": 16, "calibration": scores}

    def divergence(plan: Plan) -> float:
        kept = torch.tensor(kept_of(plan))
        made = build_model(
            plan.model_class, plan.target_config, target_tensors(plan, Checkpoint(speaking)), torch.float32
        )
        assert plan.kept_tokens is not None
        spoken = cut_tokenizer(tokenizer_of(str(speaking)), plan.kept_tokens)
        model, total = load(speaking, plan.model_class), []
        for batch in token_batches(str(text), spoken, len(kept), DataOptions(4096, 64)):
            with torch.no_grad():
                p = model(kept[batch["input_ids"]]).logits[..., kept].log_softmax(-1)
                q = made(**batch).logits.log_softmax(-1)
            total.append(float((p.exp() * (p - q)).sum(-1).mean()))
        return sum(total) / len(total)

    found = {r: divergence(anysize.plan(speaking, readers=r, **options)) for r in ("sequential", "least-squares")}
    assert found["sequential"] < found["least-squares"]
    # Read under the target's ids, the source would be followed on another text.
    monkeypatch.setattr("anysize.sequential.in_source_ids", lambda batch, _axes: batch)
    assert divergence(anysize.plan(speaking, readers="sequential", **options)) > found["sequential"]


def test_without_a_tokenizer_there_is_nothing_to_follow(speaking: Path, tmp_path: Path) -> None:
    source = in_memory(speaking)
    text = written(tmp_path, "long.txt", PAGE * 20)
    scores = anysize.calibrate(source, text, sequence_length=64, tokenizer=str(speaking))
    options: Any = {"keep_tokens": range(300), "hidden_size": 16, "calibration": scores}
    plan = anysize.plan(source, **options)
    assert plan.options.readers == "least-squares"
    assert "readers are least-squares, not sequential: tokens are cut of a model without a tokenizer" in plan.notes
    with pytest.raises(SizeError, match="but tokens are cut of a model without a tokenizer: use least-squares"):
        anysize.plan(source, readers="sequential", **options)


def test_a_tied_gain_is_fitted_to_the_tokens_that_are_left(tied_llama: Path, tied_scores: Any) -> None:
    name, options = "model.norm.weight:value", {"calibration": tied_scores, "readers": "least-squares"}
    whole = anysize.plan(tied_llama, hidden_size=16, **options)
    cut = anysize.plan(tied_llama, hidden_size=16, keep_tokens=["w5", "w9", "w11"], **options)
    assert not (whole.dense[name] == cut.dense[name]).all()


def test_an_embedding_s_fan_in_is_one(tied_llama: Path) -> None:
    options: Any = {"preset": "subcloning", "select": "first", "intermediate_size": 24}
    plans = [anysize.plan(tied_llama, **options, **more) for more in ({}, {"keep_tokens": ["w5", "w9"]})]
    factors = [{r.name: r.factor for r in plan.recipes} for plan in plans]
    assert factors[0] == factors[1]
    assert max(factors[0].values()) > 1


def test_a_budget_counts_the_tokens_that_are_left(speaking: Path) -> None:
    from anysize.tensors import num_parameters

    budget = 60_000
    for wish in ({}, {"keep_tokens": WORDS}):
        plan = anysize.plan(speaking, num_params=budget, **wish)
        assert abs(num_parameters(understand(plan.target_config)) - budget) < 4_000, wish
