"""How exact growth is: every family, preset, ratio and tying, in float32 on stock transformers models.

    python -m benchmarks.exactness.run [--quick]

Each row grows a small random model in width, heads, feed-forward and depth at once and holds its logits against the
source's; beside it stands the same with one mistake, that readers do not divide by their share.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from anysize.arch import table
from anysize.config import understand
from anysize.errors import SizeError
from anysize.executor import target_tensors
from anysize.io.models import NamedTensors, build_model, config_of, disk_tensors, model_class, quiet_transformers
from anysize.planner import make_plan
from anysize.presets import PRESETS
from anysize.proof.distance import logit_error
from anysize.proof.miniature import mistaken, random_weights
from anysize.recipe import Options, Plan
from anysize.target import public_sizes
from benchmarks.measure import write_results

TOLERANCE = 1e-5
CONTROL_RATIO = 1e4
_VOCAB = 61


def _source(family: str, raw: Mapping[str, Any], *, tied: bool, seed: int) -> NamedTensors:
    model_type = family.partition(" ")[0]
    architecture = table(model_type)
    config: dict[str, Any] = {"model_type": model_type, "architectures": [architecture.classes[0]], **raw}
    if architecture.modality == "text":
        config |= {"vocab_size": _VOCAB, "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": None}
    with quiet_transformers():
        full = config_of(config)
        model = model_class(architecture.classes[0])._from_config(full, dtype=torch.float32)
    random_weights(model, seed)
    known = {**full.to_dict(), **config}
    return NamedTensors(known, disk_tensors(model))


def _inputs(source: NamedTensors) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if "image_size" in source.config:
        return {"pixel_values": torch.randn((4, 3, 12, 12), generator=generator)}
    return {"input_ids": torch.randint(0, _VOCAB, (4, 24), generator=generator)}


@torch.no_grad()
def _logits(class_name: str, raw: Mapping[str, Any], tensors: dict[str, torch.Tensor], inputs: Any) -> torch.Tensor:
    return build_model(class_name, raw, tensors, torch.float32)(**inputs).logits


def _request(source: NamedTensors, sizes: Mapping[str, Any], *, heads: bool, depth: bool) -> dict[str, int]:
    here = public_sizes(understand(source.config))
    request = {name: size for name, size in sizes.items() if name != "heads"}
    if not depth:
        request.pop("num_hidden_layers")
    if heads and here["num_key_value_heads"] != here["num_attention_heads"]:
        for name in ("num_attention_heads", "num_key_value_heads"):
            request[name] = int(here[name] * sizes["heads"])
    return request


def _plan(source: NamedTensors, sizes: Mapping[str, Any], preset: str, seed: int) -> tuple[Plan | None, list[str]]:
    """Return the plan with as many axes grown as the family allows, and the reasons for each that it refuses."""
    refused: list[str] = []
    for heads, depth in ((True, True), (False, True), (True, False), (False, False)):
        try:
            request = _request(source, sizes, heads=heads, depth=depth)
            return make_plan(source, request, Options(preset=preset, seed=seed)), refused
        except SizeError as error:
            refused.append(str(error))
    return None, refused


def measure(
    family: str, raw: Mapping[str, Any], sizes: Mapping[str, Any], preset: str, *, tied: bool
) -> dict[str, Any]:
    """Return one row: the error, the control's error, what was grown, and what the family refused."""
    source = _source(family, raw, tied=tied, seed=0)
    made, refused = _plan(source, sizes, preset, seed=0)
    if made is None:
        return {"error": None, "control": None, "refused": refused[-1]}
    inputs = _inputs(source)
    wanted = _logits(made.model_class, source.config, {n: source.read(n) for n in source.tensors}, inputs)
    error, control = (
        logit_error(wanted, _logits(plan.model_class, plan.target_config, target_tensors(plan, source), inputs))
        for plan in (made, mistaken(made))
    )
    grown = [axis for axis, axis_map in made.axes.items() if not axis_map.is_identity]
    grown += ["layer"] if len(made.layers) > 2 else []
    return {"error": error, "control": control, "grown": grown, "refused": refused[0] if refused else None}


def main() -> None:
    """Measure every row, print it, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the default preset only, and write nothing")
    quick = parser.parse_args().quick
    arms = json.loads(Path(__file__).with_name("arms.json").read_text())
    rows: list[dict[str, Any]] = []
    for family, raw in arms["families"].items():
        text = table(family.partition(" ")[0]).modality == "text"
        for tied in (True, False) if text else (False,):
            for ratio, sizes in arms["sizes"].items():
                for preset in ["fresh"] if quick else PRESETS:
                    measured = measure(family, raw, sizes, preset, tied=tied)
                    rows.append({"family": family, "tied": tied, "ratio": ratio, "preset": preset, **measured})
                    print(rows[-1], flush=True)
    exact = [row for row in rows if row["error"] is not None]
    summary = {
        "num_rows": len(rows),
        "num_refused": len(rows) - len(exact),
        "worst_error": max(row["error"] for row in exact),
        "error_asked": TOLERANCE,
        "least_control_ratio": min(row["control"] / max(row["error"], 1e-9) for row in exact),
        "control_ratio_asked": CONTROL_RATIO,
    }
    print(summary)
    if not quick:
        print(write_results(__file__, {"summary": summary, "rows": rows}))


if __name__ == "__main__":
    main()
