"""Turn what a user calls a model, a folder or a Hub id, into a folder on this machine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from anysize.errors import CheckpointError, InputError
from anysize.io.reader import Checkpoint, TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Weights as safetensors only; whatever else a checkpoint needs is text. No Python file is ever fetched.
_WEIGHTS = ["*.safetensors"]
_TEXT = [
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "LICENSE*",
]


def local_folder(model: str, *, without_weights: bool = False) -> Path:
    """Return the folder of a model given as a path or a Hub id; a Hub id is downloaded (or found in the cache).

    With `without_weights`, no weights are downloaded. `HF_HUB_OFFLINE`, `HF_HOME` and `HF_TOKEN` work as everywhere.
    Raises CheckpointError when there is no such model.
    """
    path = Path(model).expanduser()
    if path.exists():
        if path.is_file():
            raise CheckpointError(f"'{model}' is a file, wanted a checkpoint folder or a Hub id")
        return path
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(f"'{model}' is not a folder, and not a Hub id such as org/name either")
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(model, allow_patterns=_TEXT if without_weights else [*_WEIGHTS, *_TEXT]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"'{model}' is not a folder here and could not be had from the Hub: {reason}") from error


def open_checkpoint(model: str) -> Checkpoint:
    """Return the checkpoint that a path or a Hub id names; a Hub id stays its location, so that plans travel."""
    return Checkpoint(local_folder(model), location=None if Path(model).expanduser().exists() else model)


def open_source(source: str | Path | PreTrainedModel) -> TensorSource:
    """Return a folder, a Hub id or a loaded model as a source of tensors.

    Raises InputError for anything else, CheckpointError where there is no such model.
    """
    if isinstance(source, (str, Path)):
        return open_checkpoint(str(source))
    if not hasattr(source, "config") or not hasattr(source, "state_dict"):
        raise InputError(f"the source is a {type(source).__name__}, wanted a folder, a Hub id or a transformers model")
    from anysize.io.models import LoadedModel  # noqa: PLC0415 - it needs torch

    return LoadedModel(source)
