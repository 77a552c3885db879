"""What an evaluation found, as data: every figure with its unit in its name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from anysize.errors import OutputError
from anysize.io.whole import told_of_disk, write_whole


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TextSource(_Figures):
    """The source on the same tokens. `kl_nats_per_token` is KL(source || model), averaged over all of them.

    `top1_agreement` is the share of tokens where both find the same token most likely.
    """

    source: str
    loss_nats_per_token: float
    bits_per_byte: float
    top1_accuracy: float
    kl_nats_per_token: float
    top1_agreement: float


class TextFigures(_Figures):
    """Loss over `num_tokens` predicted tokens, which spell `num_bytes` bytes of UTF-8 text.

    `num_unknown_tokens` of them stand for text that the tokenizer cannot spell; their bits do not encode that text.
    """

    num_documents: int
    num_tokens: int
    num_bytes: int
    num_unknown_tokens: int
    sequence_length: int
    loss_nats_per_token: float
    bits_per_byte: float
    top1_accuracy: float
    source: TextSource | None = None


class ImageSource(_Figures):
    """The source on the same images; as `TextSource`."""

    source: str
    loss_nats_per_image: float
    top1_accuracy: float
    kl_nats_per_image: float
    top1_agreement: float


class ImageFigures(_Figures):
    """Cross-entropy and accuracy against the labels of `num_images` images."""

    num_images: int
    loss_nats_per_image: float
    top1_accuracy: float
    source: ImageSource | None = None


class TaskScore(_Figures):
    """One task of lm-eval, or the mean of a group of them, whose members are `parts`.

    `metrics` holds acc, acc_norm or perplexity; `standard_errors` those of shares, from the number of examples.
    """

    task: str
    num_examples: int
    metrics: dict[str, float]
    standard_errors: dict[str, float]
    parts: tuple[TaskScore, ...] = ()


class Evaluation(_Figures):
    """All that one run measured; `text` or `images` where data were given, `tasks` where tasks were."""

    format: Literal[1] = 1
    model: str
    model_type: str
    num_parameters: int
    dtype: str
    device: str
    data: str | None
    text: TextFigures | None
    images: ImageFigures | None
    tasks: tuple[TaskScore, ...]
    versions: dict[str, str]
    wall_s: float


def check_output(path: Path) -> None:
    """Raise OutputError where a result could not be written, before hours are spent on it."""
    if path.is_dir():
        raise OutputError(f"cannot write the result to '{path}': it is a folder, wanted a file name such as eval.json")
    if not path.expanduser().absolute().parent.is_dir():
        raise OutputError(f"cannot write the result to '{path}': its folder does not exist")


def save(found: Evaluation, path: Path) -> None:
    """Write an evaluation as JSON, at once under its name; raise OutputError where that fails."""
    check_output(path)
    path = path.expanduser()
    with told_of_disk(f"cannot write the result to '{path}'"):
        write_whole({path: (found.model_dump_json(indent=1) + "\n").encode()})
