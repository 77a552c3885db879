"""Say what a checkpoint is: family, sizes, axes, parameters, storage, and the record anysize left in it."""

from __future__ import annotations

from collections import Counter
from math import prod

from pydantic import BaseModel, ConfigDict

from anysize.config import understand
from anysize.io.hub import open_checkpoint
from anysize.io.provenance import read_record
from anysize.proof.coverage import check_source
from anysize.target import public_sizes


class Inspection(BaseModel):
    """What `anysize inspect` shows; sizes under transformers' usual names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    model_type: str
    model_class: str
    sizes: dict[str, int]
    tied: bool
    num_parameters: int
    num_bytes: int
    num_files: int
    num_tensors: int
    dtypes: dict[str, int]
    dropped: dict[str, str]
    made_by: str | None
    exact: bool | None


def inspect_model(model: str) -> Inspection:
    """Return what a checkpoint folder or Hub id holds; raise as `anysize.plan` does where it is not understood."""
    checkpoint = open_checkpoint(model)
    config = understand(checkpoint.config)
    _, dropped = check_source(config, checkpoint)
    weights = {name: info for name, info in checkpoint.tensors.items() if name not in dropped}
    record = read_record(checkpoint.folder) or {}
    return Inspection(
        location=checkpoint.location,
        model_type=config.architecture.model_type,
        model_class=config.model_class,
        sizes=public_sizes(config),
        tied=config.tied,
        num_parameters=sum(prod(info.shape) for info in weights.values()),
        num_bytes=sum(info.end - info.begin for info in weights.values()),
        num_files=len({info.path for info in weights.values()}),
        num_tensors=len(weights),
        dtypes=dict(Counter(info.dtype for info in weights.values())),
        dropped=dropped,
        made_by=record.get("command"),
        exact=record.get("exact"),
    )
