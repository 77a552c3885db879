"""The writer map of the residual stream: what a target's stream is where it computes what the source does."""

from __future__ import annotations

import torch

from anysize.arch.schema import Parameter
from anysize.axis import keep
from anysize.config import understand
from anysize.executor import DimMaps, TensorJob
from anysize.notation import parse
from anysize.recipe import Plan
from anysize.tensors import expected_tensors

# A matrix with a row of the stream for every input.
_ARROW = "vocab -> hidden, stored in x out"


def streams_in_common(plan: Plan) -> list[tuple[int, int]]:
    """Return pairs of layers, of the target and of the source, before which both have the same stream after growth.

    Layers that start silent hand on what the layer before them left. What comes after a source's last layer is left
    out, because models give it only as their final norm has changed it.
    """
    last, found, state = understand(plan.source_config).sizes["layer"], list[tuple[int, int]](), 0
    for layer, step in enumerate(plan.layers):
        state = state if step.silent else step.source
        if state < last:
            found.append((layer, state))
        state = state if step.silent else step.source + 1
    return found


def stream_writer(plan: Plan) -> torch.Tensor:
    """Return R, float32 [m, n], so that the target's stream is R times the source's right after a plan is applied.

    It is what the plan does to an embedding that has every unit vector of the source's stream as a row.
    """
    source, target = understand(plan.source_config), understand(plan.target_config)
    n, m = source.sizes["hidden"], target.sizes["hidden"]
    expected = expected_tensors(target)
    recipe, origin = next(
        (recipe, origin)
        for recipe in plan.recipes
        if isinstance(origin := expected[recipe.name].origin, Parameter)
        and recipe.layer is None
        and [str(dim) for dim in parse(recipe.arrow).writes] == ["hidden"]
    )
    unit = recipe.model_copy(
        update={"arrow": _ARROW, "source_shape": (n, n), "shape": (n, m), "source_dtype": "F32", "dtype": "F32",
                "reader": "", "share": "none", "noise_db": None}
    )  # fmt: skip
    job = TensorJob(unit, torch.eye(n), DimMaps({**plan.axes, "vocab": keep(n)}, plan.dense), plan.seed)
    writer = torch.cat([job.block(i) for i in range(job.num_blocks)]).reshape(n, m).T
    # A multiplier that grows with the target was taken out of the stored embedding and comes back at run time.
    return writer * (m / n) ** 0.5 if origin.times == "hidden" else writer
