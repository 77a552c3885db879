"""`anysize.evaluate` against sums made by hand with the stock model, and everything that it refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import anysize
from anysize.errors import CheckpointError, InputError, OutputError
from anysize.io.models import quiet_transformers, tokenizer_of
from tests import tiny

Run = Callable[..., Any]
WIDER = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 96}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of 1 to 90 words that the tiny llamas know, one of them empty."""
    draw = torch.Generator().manual_seed(5)
    texts = [
        " ".join(f"w{i}" for i in torch.randint(3, 61, (count,), generator=draw).tolist())
        for count in (7, 90, 0, 33, 1, 64)
    ]
    path = tmp_path_factory.mktemp("held-out") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": number}) + "\n" for number, text in enumerate(texts)))
    return path


def texts_of(rows: Path) -> list[str]:
    return [json.loads(line)["text"] for line in rows.read_text().splitlines()]


def stock(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder).eval()


def log_probabilities(folder: Path, rows: Path) -> torch.Tensor:
    """What the stock model says of every token, in float64, one document at a time: [tokens, vocabulary]."""
    tokenizer, model = tokenizer_of(str(folder)), stock(folder).double()
    with torch.no_grad():
        return torch.cat([
            model(input_ids=torch.tensor([[0, *ids[:-1]]])).logits[0].log_softmax(-1)
            for ids in (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts_of(rows) if text)
        ])  # fmt: skip


def targets(folder: Path, rows: Path) -> torch.Tensor:
    tokenizer = tokenizer_of(str(folder))
    return torch.tensor([i for text in texts_of(rows) for i in tokenizer(text, add_special_tokens=False)["input_ids"]])


def test_the_loss_is_that_of_the_stock_model_summed_by_hand(llama: Path, rows: Path) -> None:
    found = anysize.evaluate(llama, rows, batch_size=3)

    assert found.text is not None
    ids, text = targets(llama, rows), found.text
    told = log_probabilities(llama, rows)
    nats = -told.gather(-1, ids[:, None]).sum()
    assert (text.num_documents, text.num_tokens, text.num_unknown_tokens) == (5, len(ids), 0)
    assert text.sequence_length == 128
    assert text.num_bytes == sum(len(each.encode()) for each in texts_of(rows))
    assert text.loss_nats_per_token == pytest.approx(float(nats) / len(ids), rel=1e-6)
    assert text.bits_per_byte == pytest.approx(float(nats) / log(2) / text.num_bytes, rel=1e-6)
    assert text.top1_accuracy == pytest.approx(float((told.argmax(-1) == ids).double().mean()))
    assert (found.data, found.model_type, found.dtype) == (str(rows), "llama", "float32")


def test_kl_and_agreement_are_those_of_the_whole_distributions(
    llama: Path, new_llama: Run, rows: Path, tmp_path: Path
) -> None:
    other = new_llama(tmp_path / "other", seed=1)
    text = anysize.evaluate(other, rows, source=llama).text

    assert text is not None
    assert text.source is not None
    p, q = log_probabilities(llama, rows), log_probabilities(other, rows)
    kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / len(p)
    assert text.source.kl_nats_per_token == pytest.approx(float(kl), rel=1e-5)
    assert text.source.kl_nats_per_token > 0.1
    assert text.source.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert text.source.top1_agreement < 0.5
    alone = anysize.evaluate(llama, rows).text
    assert alone is not None
    assert text.source.loss_nats_per_token == pytest.approx(alone.loss_nats_per_token, rel=1e-9)
    assert text.source.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-9)


def test_a_model_is_its_own_source(llama: Path, rows: Path) -> None:
    text = anysize.evaluate(llama, rows, source=llama, sequence_length=16).text
    assert text is not None
    assert text.source is not None
    assert text.source.kl_nats_per_token == 0
    assert text.source.top1_agreement == 1
    assert text.source.loss_nats_per_token == text.loss_nats_per_token


def test_a_grown_model_agrees_with_its_source_and_a_wrong_one_does_not(llama: Path, rows: Path) -> None:
    grown: Any = anysize.resize(llama, preset="split", **WIDER)
    with torch.no_grad():
        right = anysize.evaluate(grown, rows, source=llama, tokenizer=str(llama)).text
        grown.model.layers[1].mlp.down_proj.weight[:4] *= -1
        wrong = anysize.evaluate(grown, rows, source=llama, tokenizer=str(llama)).text
    for text, exact in ((right, True), (wrong, False)):
        assert text is not None
        assert text.source is not None
        assert (abs(text.source.kl_nats_per_token) < 1e-6) == exact
        assert (text.source.top1_agreement == 1) == exact


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma", "mixtral"])
def test_batches_and_padding_do_not_change_the_figures(family: str, llama: Path, rows: Path) -> None:
    made = next(v for v in tiny.VARIANTS if v.family == family)
    model = tiny.model(made, dtype=torch.float32)
    # 31 tokens: words beyond them are left out.
    short = rows.with_name(f"{family}.jsonl")
    few = [" ".join(f"w{i % 28 + 3}" for i in range(count)) for count in (1, 40, 9)]
    short.write_text("".join(json.dumps({"text": text}) + "\n" for text in few))

    one, many = (
        anysize.evaluate(model, short, tokenizer=str(llama), sequence_length=16, batch_size=size).text
        for size in (1, 5)
    )

    assert one is not None
    assert many is not None
    assert one.num_tokens == many.num_tokens == 50
    assert one.loss_nats_per_token == pytest.approx(many.loss_nats_per_token, rel=1e-6)


def test_the_first_tokens_are_read_and_no_more(llama: Path, rows: Path, tmp_path: Path) -> None:
    head = tmp_path / "head.jsonl"
    head.write_text("\n".join(rows.read_text().splitlines()[:2]))
    cut, whole = anysize.evaluate(llama, rows, tokens=97).text, anysize.evaluate(llama, head).text
    assert cut == whole
    less = anysize.evaluate(llama, rows, tokens=50).text
    assert less is not None
    assert (less.num_tokens, less.num_documents) == (50, 2)
    assert less.num_bytes < whole.num_bytes  # pyright: ignore[reportOptionalMemberAccess]


def test_a_larger_vocabulary_is_compared_on_the_tokens_of_the_source(llama: Path, rows: Path, tmp_path: Path) -> None:
    padded = anysize.resize(llama, tmp_path / "padded", pad_vocab_to_multiple_of=32)
    text = anysize.evaluate(padded, rows, source=llama).text
    assert text is not None
    assert text.source is not None
    # The new rows take probability from the old, the same from all of them.
    rise = text.loss_nats_per_token - text.source.loss_nats_per_token
    assert text.source.kl_nats_per_token == pytest.approx(rise, rel=1e-4)
    assert rise > 0.01


def test_a_loaded_model_measures_alike_and_stays_as_it_was(llama: Path, rows: Path) -> None:
    model = stock(llama).train()
    assert anysize.evaluate(model, rows).text == anysize.evaluate(llama, rows).text
    assert model.training
    assert anysize.evaluate(llama, rows, dtype="bfloat16").text != anysize.evaluate(llama, rows).text


def test_unknown_tokens_are_counted(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "page.txt").write_text("w5 w6 lord w7 master")
    text = anysize.evaluate(llama, tmp_path / "page.txt").text
    assert text is not None
    assert (text.num_tokens, text.num_unknown_tokens) == (5, 2)


def test_progress_counts_what_was_scored(llama: Path, rows: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    found = anysize.evaluate(llama, rows, tokens=100, batch_size=1, progress=lambda *told: heard.append(told)).text
    assert heard[0] == ("evaluate", 0, 100)
    assert heard[-1] == ("evaluate", 100, 100)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert found is not None
    assert found.num_tokens == 100


def test_cut_tokens_are_refused_with_the_reason(speaking: Path, page: Path, tmp_path: Path) -> None:
    cut = anysize.resize(speaking, tmp_path / "cut", keep_tokens=str(page))
    for model, source in ((cut, speaking), (speaking, cut)):
        with pytest.raises(InputError, match=r"was cut by --keep-tokens to .* tokens .* compare their bits per byte"):
            anysize.evaluate(model, page, source=source)
    alone = anysize.evaluate(cut, page).text
    assert alone is not None
    assert alone.num_bytes == len(page.read_bytes())


def test_other_tokenizers_are_refused(llama: Path, speaking: Path, new_llama: Run, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 61 tokens and the source .* 323: KL\(source \|\| model\) is infinite"):
        anysize.evaluate(llama, rows, source=speaking)
    other = new_llama(tmp_path / "other")
    told = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(told.replace('"w5"', '"q"').replace('"w6"', '"w5"').replace('"q"', '"w6"'))
    with pytest.raises(InputError, match=r"the tokenizers of model and source spell 'w.*' in different tokens"):
        anysize.evaluate(llama, rows, source=other)


def change(folder: Path, name: str, factor: float) -> Path:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite_are_refused(new_llama: Run, rows: Path, tmp_path: Path) -> None:
    broken = change(new_llama(tmp_path / "broken"), "model.norm.weight", float("nan"))
    with pytest.raises(InputError, match="the model's loss is nan on these data"):
        anysize.evaluate(broken, rows)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"data": None}, "nothing to measure: give data, tasks or both"),
        (
            {"data": None, "source": "x", "tasks": ["blimp"]},
            "a source is compared on data: give data as well; tasks need",
        ),
        ({"limit": 3}, "task_data and limit do nothing without tasks"),
        ({"task_data": "."}, "task_data and limit do nothing without tasks"),
        ({"tokens": 0, "batch_size": -1}, "tokens=0; batch_size=-1: wanted at least 1"),
        ({"sequence_length": 129}, "sequence_length=129: '"),
        ({"label_column": "x"}, "label_column='x': '"),
        ({"dtype": "int8"}, "dtype='int8': wanted auto, float32, bfloat16, float16"),
        ({"device": "nope"}, "the device 'nope' cannot be used"),
        ({"column": "n"}, "the column 'n' of the data '"),
        ({"data": "/nowhere/x.txt"}, "the data '/nowhere/x.txt' do not exist"),
        ({"tasks": ["blimb"], "task_data": "."}, "unknown task 'blimb' (did you mean 'blimp'?); known are arc_easy, "),
        ({"tasks": ["piqa", "piqa"], "task_data": "."}, "task 'piqa' is named twice"),
        ({"tasks": ["piqa"], "task_data": "/nowhere"}, "the task data '/nowhere' are not a folder"),
        ({"split": ""}, "split='': wanted the name of a split"),
        (
            {"data": None, "tasks": ["piqa"], "task_data": ".", "tokens": 5, "column": "x"},
            "tokens, column: of data, and",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    llama: Path, rows: Path, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError) as refusal:
        anysize.evaluate(llama, **{"data": rows, **options})
    assert str(refusal.value).startswith(sentence)


def test_data_that_cannot_be_used_are_refused(llama: Path, tmp_path: Path) -> None:
    files = {
        "empty.txt": (b"", "hold no text to predict"),
        "latin.txt": (b"\xe9\xff", "cannot read the data file"),
        "torn.parquet": (b"PAR1nothing", "cannot read the data file"),
        "torn.jsonl": (b'{"text": "w5"}\n{"text', "cannot read the data file"),
        "mixed.odt": (b"w5", "is none of .txt"),
    }
    for name, (content, sentence) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=sentence):
            anysize.evaluate(llama, tmp_path / name)
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"the data folder '.*' holds no \.txt"):
        anysize.evaluate(llama, tmp_path / "folder")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: it has no config.json"):
        anysize.evaluate(tmp_path / "folder", tmp_path / "empty.txt")
    model: Any = 5
    with pytest.raises(InputError, match="the model is a int, wanted a folder, a Hub id or a transformers model"):
        anysize.evaluate(model, tmp_path / "empty.txt")


def test_a_loaded_model_is_not_moved(llama: Path, rows: Path) -> None:
    with pytest.raises(InputError, match="device=cpu and dtype=bfloat16: the model is loaded already"):
        anysize.evaluate(stock(llama), rows, device="cpu", dtype="bfloat16")


def test_the_command_prints_and_writes_the_same_figures(llama: Path, rows: Path, tmp_path: Path, cli: Run) -> None:
    output = tmp_path / "found.json"
    ran = cli("eval", llama, "--data", rows, "--source", llama, "-o", output, "--json")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert told == json.loads(output.read_text())
    assert told["text"] == anysize.evaluate(llama, rows, source=llama).text.model_dump()  # pyright: ignore[reportOptionalMemberAccess]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    shown = cli("eval", llama, "--data", rows, "--source", llama).out
    lines = {line.split("  ")[0]: line.split()[-2:] for line in shown.splitlines()}
    assert lines["loss, nats/token"] == [f"{told['text']['loss_nats_per_token']:.4f}"] * 2
    assert lines["KL(source || model), nats/token"] == ["nats/token", "0"]


def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    llama: Path, rows: Path, tmp_path: Path, cli: Run
) -> None:
    from anysize.evals.evaluation import check_output

    for path, why in ((tmp_path, "it is a folder"), (tmp_path / "no" / "x.json", "its folder does not exist")):
        with pytest.raises(OutputError, match=why):
            check_output(path)
        assert cli("eval", llama, "--data", rows, "-o", path).code == 2


def test_a_disk_that_is_full_costs_the_file_and_not_the_figures(
    llama: Path, rows: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.evals import evaluation

    def full(_contents: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation, "write_whole", full)
    ran = cli("eval", llama, "--data", rows, "-o", tmp_path / "found.json", "--json")
    assert (ran.code, "No space left on device" in ran.err) == (2, True)
    figures, error = map(json.loads, ran.out.splitlines())
    assert (figures["text"]["num_documents"], error["exit_code"]) == (5, 2)


def test_without_lm_eval_tasks_say_how_to_get_it(
    llama: Path, tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.evals import harness

    (tmp_path / "piqa.parquet").touch()
    monkeypatch.setattr(harness, "find_spec", lambda _name: None)
    ran = cli("eval", llama, "--tasks", "piqa", "--task-data", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert (
        ran.err == "anysize: tasks are run by lm-eval, which is not installed: install anysize with its extra 'eval'\n"
    )


# Images


@pytest.fixture(scope="module")
def vit() -> Any:
    return tiny.model(next(v for v in tiny.VARIANTS if v.family == "vit"), dtype=torch.float32)


def pictures(path: Path, labels: list[Any], *, column: str = "label") -> Path:
    from PIL import Image
    from pyarrow import Table, parquet

    draw = torch.Generator().manual_seed(2)
    made: list[dict[str, Any]] = []
    for label in labels:
        stored = io.BytesIO()
        pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=draw)
        Image.fromarray(pixels.numpy()).save(stored, "PNG")
        made.append({"image": {"bytes": stored.getvalue(), "path": None}, column: label})
    parquet.write_table(Table.from_pylist(made), path)
    return path


def test_images_are_held_against_their_labels(vit: Any, tmp_path: Path) -> None:
    labels = [0, 3, 6, 1, 2, 2, 5]
    other = tiny.model(next(v for v in tiny.VARIANTS if v.family == "vit"), dtype=torch.float32, seed=4)
    images = anysize.evaluate(vit, pictures(tmp_path / "x.parquet", labels), source=other, batch_size=3).images

    draw = torch.Generator().manual_seed(2)
    pixels = torch.stack([torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=draw) for _ in labels])
    given = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        q, p = (model(given).logits.double().log_softmax(-1) for model in (vit, other))
    wanted = torch.tensor(labels)
    assert images is not None
    assert images.source is not None
    assert images.num_images == 7
    for found, told in ((images, q), (images.source, p)):
        assert found.loss_nats_per_image == pytest.approx(float(-told.gather(-1, wanted[:, None]).mean()), rel=1e-5)
        assert found.top1_accuracy == pytest.approx(float((told.argmax(-1) == wanted).double().mean()))
    kl = torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
    assert images.source.kl_nats_per_image == pytest.approx(float(kl), rel=1e-4)
    assert images.source.kl_nats_per_image > 0.01


def test_an_image_model_is_its_own_source_on_the_first_images(vit: Any, tmp_path: Path) -> None:
    data = pictures(tmp_path / "x.parquet", [1, 2, 3, 4], column="kind")
    images = anysize.evaluate(vit, data, source=vit, tokens=3, label_column="kind").images
    assert images is not None
    assert images.source is not None
    assert images.num_images == 3
    assert (images.source.kl_nats_per_image, images.source.top1_agreement) == (0, 1)


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ([7], {}, r"the label 7 in '.*' is none of the 7"),
        ([-1], {}, r"the label -1 in '.*' is none of the 7"),
        (["a"], {}, "hold 'a': wanted integers"),
        ([1], {"label_column": "kind"}, "have no column 'kind': they have image; label; name one with --label-column"),
        ([1], {"column": "label"}, "hold no images, and this model reads images"),
        ([1], {"sequence_length": 8}, "sequence_length=8: '.*' reads images"),
        ([], {}, "are empty"),
    ],
)
def test_labels_and_images_that_cannot_be_used_are_refused(
    vit: Any, tmp_path: Path, labels: list[Any], options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        anysize.evaluate(vit, pictures(tmp_path / "x.parquet", labels), **options)


def test_an_image_that_cannot_be_decoded_and_other_models_are_refused(
    vit: Any, llama: Path, rows: Path, tmp_path: Path
) -> None:
    from pyarrow import Table, parquet

    torn = tmp_path / "torn.parquet"
    parquet.write_table(Table.from_pylist([{"image": b"no picture", "label": 1}]), torn)
    with pytest.raises(InputError, match="hold an image that cannot be decoded"):
        anysize.evaluate(vit, torn)
    with pytest.raises(InputError, match=r"reads images and '.*' text: they cannot be compared"):
        anysize.evaluate(vit, torn, source=llama)
    with pytest.raises(InputError, match="have no column 'label'"):
        anysize.evaluate(vit, rows)
