"""What fitting sequential readers holds in memory: the same layers, few of them and four times as many.

    python -m benchmarks.fitting.run

A random Llama is cut to half its width, with scores of few tokens, so that activations are small beside the weights.
Peaks are beside those of the same command on a model of two layers: what is left grows with the number of layers, or
does not.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from anysize.calibration.calibrate import moment_stride
from anysize.config import understand
from anysize.tensors import num_parameters
from benchmarks.calibration.run import tokenizer_files
from benchmarks.checkpoints import llama_config, random_checkpoint
from benchmarks.measure import anysize, run, scratch_folder, write_results

LEAST, FEW, MANY = 2, 32, 128
_SIZES: dict[str, Any] = {"hidden": 512, "ffn": 1408, "heads": 8, "kv_heads": 4, "vocab": 512}
_TOKENS, _LENGTH = 512, 128
# A layer of the source and one of the target, both in single precision, and its sums in double precision.
ASKED_LAYERS = 8


def _data(folder: Path) -> str:
    """Return a text file of some hundred tokens: all of them are read when layers are fitted."""
    text = Path(tempfile.__file__).read_text(encoding="utf-8")
    (folder / "data.txt").write_text(text[: 4 * _TOKENS], encoding="utf-8")
    return str(folder / "data.txt")


def _measure(home: Path, layers: int, *, low_memory: tuple[bool, ...]) -> dict[str, Any]:
    """Return the size of a source with so many layers, and wall time and peak of fitting its half."""
    config = llama_config(layers=layers, **_SIZES)
    folder = home / f"layers-{layers}"
    random_checkpoint(folder, config)
    data = _data(folder)
    tokenizer_files(folder, Path(tempfile.__file__).read_text(encoding="utf-8"))
    understood = understand(config)
    assert moment_stride(understood) == 1
    scores = folder / "scores.safetensors"
    shape = ["--tokens", str(_TOKENS), "--sequence-length", str(_LENGTH), "--batch-size", "2"]
    run(anysize("calibrate", str(folder), data, "-o", str(scores), *shape))
    found: dict[str, Any] = {
        "layers": layers, "float32_bytes": 4 * num_parameters(understood), "scores_bytes": scores.stat().st_size
    }  # fmt: skip
    asked = ["--hidden-size", str(_SIZES["hidden"] // 2), "--calibration", str(scores), "--readers", "sequential"]
    for low in low_memory:
        more = ["--low-memory"] if low else []
        done = run(anysize("plan", str(folder), *asked, *more, "-o", str(folder / "plan.json")))
        found["low memory" if low else "as it fits"] = {"peak_bytes": done.peak_bytes, "wall_s": done.wall_s}
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Run the suite and write its results."""
    home = scratch_folder() / "fitting"
    least = _measure(home, LEAST, low_memory=(True,))
    few, many = (_measure(home, layers, low_memory=(True, False)) for layers in (FEW, MANY))
    a_layer = (many["float32_bytes"] - few["float32_bytes"]) / (MANY - FEW)
    base = least["low memory"]["peak_bytes"]
    growth = {
        way: {str(found["layers"]): found[way]["peak_bytes"] - base for found in (few, many)}
        for way in ("low memory", "as it fits")
    }
    results = {
        "sizes": _SIZES, "tokens": _TOKENS, "layer_bytes": a_layer, "runs": [least, few, many],
        "growth_over_two_layers_bytes": growth,
        "growth_in_layers": growth["low memory"][str(MANY)] / a_layer, "asked_layers": ASKED_LAYERS,
    }  # fmt: skip
    print(results)
    print(write_results(__file__, results))


if __name__ == "__main__":
    main()
