"""Scores files that are damaged: one sentence, whether they are read at once or one by one."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import tiny

from anysize.calibration.scores import Scores, model_sha256
from anysize.config import understand
from anysize.errors import CheckpointError

Run = Callable[..., Any]


def _nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj:in/second"][3, 4] = torch.nan


def _smaller(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj:in/second"] = tensors["model.layers.0.mlp.down_proj:in/second"][:-1, :-1]


def _shorter(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.mlp.down_proj:in/abs"] = tensors["model.layers.0.mlp.down_proj:in/abs"][:-1]


def _fewer_layers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["blocks/influence"] = tensors["blocks/influence"][:1]


def _less(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.layers.0.mlp.down_proj:in/abs"]


DAMAGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "NaN": (_nan, r"its 'model.layers.1.mlp.down_proj:in/second' is not what was written"),
    "a smaller matrix": (_smaller, r"is not what was written|has shape \[47, 47\], wanted \[48, 48\]"),
    "a shorter vector": (_shorter, r"is not what was written|has shape \[47\], wanted \[48\]"),
    "fewer layers": (_fewer_layers, r"is not what was written|'blocks/influence' has shape \[1\], wanted \[2\]"),
    "less": (_less, "they do not hold what was written; calibrate again"),
}


@pytest.mark.parametrize("more", [[], ["--low-memory"]], ids=["read at once", "read one by one"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_scores_are_refused_in_one_sentence(
    llama: Path, scores: Scores, tmp_path: Path, cli: Run, name: str, more: list[str]
) -> None:
    damage, why = DAMAGES[name]
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    with safe_open(path, framework="pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    damage(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, told)
    sizes = ["--num-hidden-layers", 1, "--intermediate-size", 24]
    ran = cli("plan", llama, *sizes, "--calibration", path, "--readers", "least-squares", *more)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("anysize: ")
    assert re.search(f"damaged: .*({why})", ran.err), ran.err
    save_file(load_file(path), path, {"anysize": told["anysize"]})
    with pytest.raises(CheckpointError, match="they do not hold what was written"):
        Scores.load(path)


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_bit_that_flipped_in_a_scores_file_is_seen(scores: Scores, tmp_path: Path, low_memory: bool) -> None:
    path = tmp_path / "scores.safetensors"
    scores.save(path)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"is damaged: its '.*' is not what was written; make it anew"):
        assert Scores.load(path, low_memory=low_memory).sha256


@pytest.mark.parametrize("variant", tiny.VARIANTS, ids=str)
def test_scores_are_as_large_as_the_axes_of_their_model(variant: tiny.Variant) -> None:
    from anysize.proof.cuts import miniature_scores

    source = tiny.source(variant)
    found = miniature_scores(source, understand(source.config))
    found = replace(found, record=found.record.model_copy(update={"model_sha256": model_sha256(source)}))
    found.require_model(source)
    site = next(iter(found.sites))
    short = {kind: values[:-1] for kind, values in found.sites[site].items()}
    with pytest.raises(CheckpointError, match=f"are damaged: '{site}/abs' has shape .*, wanted .*; calibrate again"):
        replace(found, sites={**found.sites, site: short}).require_model(source)
    with pytest.raises(CheckpointError, match=r"'odd/abs' has shape .*, wanted none of that name"):
        replace(found, sites={**found.sites, "odd": found.sites[site]}).require_model(source)
