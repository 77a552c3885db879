"""The options that several commands share, each declared once."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_SIZES = "Sizes"
_HOW = "How"
_OUT = "Output"


class Dtype(StrEnum):
    """Storage types a target may have."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Verify(StrEnum):
    """How much of the whole-model comparison runs."""

    auto = "auto"
    full = "full"
    off = "off"


class Select(StrEnum):
    """Scores that choose what is kept."""

    auto = "auto"
    activation = "activation"
    rms = "rms"
    minitron = "minitron"
    weight = "weight"
    random = "random"
    first = "first"
    stride = "stride"
    refit = "refit"
    principal = "principal"


class Readers(StrEnum):
    """How readers make up for what was cut."""

    auto = "auto"
    none = "none"
    fan_in = "fan-in"
    measured = "measured"
    least_squares = "least-squares"
    sequential = "sequential"


Source = Annotated[str, typer.Argument(help="A checkpoint folder or a Hub id.")]
Output = Annotated[Path, typer.Argument(help="The folder to make; it must be empty or absent.")]
Size = int | None
HiddenSize = Annotated[Size, typer.Option(help="Width of the residual stream; any size, integer or fractional ratio.")]
IntermediateSize = Annotated[Size, typer.Option(help="Neurons of each feed-forward block; any size.")]
NumHiddenLayers = Annotated[Size, typer.Option(help="Number of layers; see --layers, where a list sets it.")]
NumAttentionHeads = Annotated[Size, typer.Option(help="Query heads; with the kv heads kept, heads per group change.")]
NumKeyValueHeads = Annotated[Size, typer.Option(help="kv heads; their query heads follow as whole groups.")]
HeadDim = Annotated[Size, typer.Option(help="Width of a head; only where positions are learned, not rotary.")]
VocabSize = Annotated[Size, typer.Option(help="Rows of the vocabulary; new rows are the mean of the old.")]
KeepTokens = Annotated[
    str | None,
    typer.Option(
        help="Cut the vocabulary to these tokens: a .json or .tokens file that lists them, or text (as for calibrate) "
        "whose tokens are kept; --vocab-size then keeps so many of the most frequent."
    ),
]
PadVocab = Annotated[Size, typer.Option(help="Round the vocabulary up to a multiple of this.")]
NumExperts = Annotated[Size, typer.Option(help="Experts of each layer, in families that have them.")]
Scale = Annotated[float | None, typer.Option(help="Scale the width: hidden, heads and feed-forward in step.")]
NumParams = Annotated[str | None, typer.Option(help="Scale the width to about so many parameters, such as 350M.")]
Like = Annotated[str | None, typer.Option(help="Take the sizes of another model (folder or Hub id).")]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset",
        help="To grow: auto (= fresh), hypercloning, hypercloning-noisy, hypercloning-diagonal, "
        "hypercloning-noisy-diagonal, split or fresh. To shrink: auto (= subspace with --calibration, else "
        "weight-selection), subcloning, weight-selection, minitron or subspace.",
    ),
]
Layers = Annotated[
    str,
    typer.Option(
        help="How to add layers: identity (exact), interpose (l1 l1 l2 l2), stack (l1..ln l1..ln). How to drop them: "
        "middle, first, uniform, block-influence, relative-magnitude, angular, leave-one-out, evolutionary (a search "
        "on the data of --calibration). Or a list 0-3,2-5, which sets the depth as well."
    ),
]
SearchTokens = Annotated[
    int, typer.Option(min=1, help="How many tokens --layers evolutionary may run on: sets of layers times tokens.")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        help="What tells which coordinates to keep: a scores file of anysize calibrate, or data "
        "to calibrate on, as anysize calibrate does by default."
    ),
]
Column = Annotated[str, typer.Option(help="The text column of --calibration and --keep-tokens, if they have several.")]
SelectName = Annotated[
    Select, typer.Option("--select", help="Which score chooses what is kept; auto is the preset's own.")
]
ReadersName = Annotated[
    Readers, typer.Option("--readers", help="How readers make up for what was cut; auto is the preset's own.")
]
NoiseDb = Annotated[float, typer.Option(help="Signal-to-noise ratio of the noisy presets, in dB.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything random.")]
DtypeName = Annotated[Dtype, typer.Option("--dtype", help="Storage type of the target.")]
Untie = Annotated[bool, typer.Option("--untie", help="Give a tied head a matrix of its own.")]
StreamScale = Annotated[
    float,
    typer.Option(
        help="Multiply what writes the residual stream by so much, 1/8 to 8: the function stays, how it trains changes "
        "(docs/training.md)."
    ),
]
LowMemory = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Leave weights, scores and what is fitted on disk, whatever fits into memory; on the CPU the result is "
        "the same.",
    ),
]
VerifyName = Annotated[
    Verify,
    typer.Option(
        "--verify", help="Compare the whole models: auto where both fit in a quarter of the free memory, full, or off."
    ),
]
MaxShardSize = Annotated[str, typer.Option(help="Largest file, such as 5GB.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
AllowNonfinite = Annotated[bool, typer.Option("--allow-nonfinite", help="Go on where weights hold NaN or Inf.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
