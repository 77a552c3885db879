"""What calibration costs beside a plain forward pass over the same batches of the same model, with a control.

    python -m benchmarks.calibration.run

Rounds alternate between the three, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from anysize.calibration.calibrate import CalibrationOptions, collect, moment_stride
from anysize.calibration.data import DataOptions, batches
from anysize.config import understand
from anysize.io.models import LoadedModel, new_model
from benchmarks.measure import spread, write_results

CONFIG: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 512,
    "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 64, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
ASKED = {"without second moments": 1.3, "with second moments": 2.0}
_ROUNDS = 4
_DATA = DataOptions(tokens=4_096, sequence_length=256, batch_size=4)


def tokenizer_files(folder: Path, text: str) -> None:
    """Write a byte-level tokenizer trained on a text beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=512, show_progress=False, initial_alphabet=alphabet)
    )
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def _quiet(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _plain(model: Any, found: list[dict[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for batch in found:
            model.model(**batch, use_cache=False)


def main() -> None:
    """Run the suite and write its results."""
    torch.manual_seed(0)
    model: Any = new_model("LlamaForCausalLM", CONFIG, torch.float32).eval()
    tensors = LoadedModel(model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = "\n".join(
            p.read_text(encoding="utf-8") for p in sorted(Path(tempfile.__file__).parent.glob("[a-d]*.py"))
        )
        (folder / "data.txt").write_text(text, encoding="utf-8")
        tokenizer_files(folder, text[:500_000])
        data = str(folder / "data.txt")
        found = list(batches(data, understand(CONFIG), place, _DATA))

        def calibrate(*, second_moments: bool) -> None:
            options = CalibrationOptions(data=_DATA, second_moments=second_moments)
            collect(tensors, model, data, place, options, progress=_quiet)

        ways = {
            "a plain forward pass": lambda: _plain(model, found),
            "without second moments": lambda: calibrate(second_moments=False),
            "with second moments": lambda: calibrate(second_moments=True),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_ROUNDS + 1):
            for name, way in ways.items():
                begin = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - begin)
    plain = seconds.pop("a plain forward pass")[1:]
    ratios = {name: [a / b for a, b in zip(times[1:], plain, strict=True)] for name, times in seconds.items()}
    results = {
        "config": CONFIG, "tokens": sum(b["input_ids"].numel() for b in found), "forward_s": spread(plain),
        "moment_stride": moment_stride(understand(CONFIG)),
        "ratios": {name: {**spread(values), "asked": ASKED[name]} for name, values in ratios.items()},
    }  # fmt: skip
    write_results(__file__, results)
    print(results)


if __name__ == "__main__":
    main()
