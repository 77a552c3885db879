"""Plan: pure data. It says what every target tensor is made of, prints, saves as JSON and replays to the same bytes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anysize.axis import AxisMap
from anysize.config import understand
from anysize.dense import DenseMaps, beside
from anysize.errors import CheckpointError, OutputError
from anysize.io.whole import told_of_disk, write_whole
from anysize.layers import LayerStep
from anysize.tensors import num_parameters

FORMAT = 1
Share = Literal["none", "equal", "diagonal", "random"]
Pad = Literal["zero", "mean", "one"]
Select = Literal["auto", "activation", "rms", "minitron", "weight", "random", "first", "stride", "refit", "principal"]
Readers = Literal["auto", "none", "fan-in", "measured", "least-squares", "sequential"]
Dtype = Literal["F64", "F32", "BF16", "F16"]
# Beyond these, half precision has no room for what is multiplied, nor a gain that is stored less one.
StreamScale = Annotated[float, Field(ge=1 / 8, le=8, strict=True)]
BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


class Recipe(BaseModel):
    """How one target tensor is made from one source tensor.

    arrow: what it reads and writes; the axis maps of the plan do the rest. factor: multiplies every copied value.
    stored_as: "1+w" where the file holds the gain minus one. share: how reader columns divide over copies.
    noise_db: signal-to-noise ratio of the +-noise in the null space of the copies. pad: what new coordinates of
    `hidden` hold. fresh_scale: standard deviation of new values over the root mean square of the source's, scaled
    by factor; fresh_std: the same as such, where that gives 0. score_power: see `dims`. new_gain: what pad "one"
    holds. silent: the tensor ends a branch of an identity layer and is zero. layer, expert: whose own axis maps
    ("ffn.3", "ffn.3.5") apply, in target numbers. reader, writer: names of the dense maps that stand for the axis
    maps of what is read or written. value: name of the fitted array that is the target tensor.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    source: str
    arrow: str
    source_shape: tuple[int, ...]
    shape: tuple[int, ...]
    source_dtype: Dtype
    dtype: Dtype
    factor: float = 1.0
    stored_as: Literal["w", "1+w"] = "w"
    share: Share = "none"
    noise_db: float | None = None
    pad: Pad = "zero"
    fresh_scale: float = 0.0
    fresh_std: float = 0.0
    score_power: float = 0.25
    new_gain: float = Field(default=1.0, gt=0)
    silent: bool = False
    layer: int | None = None
    expert: int | None = None
    reader: str = ""
    writer: str = ""
    value: str = ""

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * BYTES[self.dtype]


class Options(BaseModel):
    """What a user may ask for beside sizes; every one changes the plan or raises.

    preset: a growth or a shrink preset or "auto"; the other direction takes its own default. select: which score
    chooses what is kept. readers: how readers make up for what was cut. layers: see `layers.layer_plan`.
    search_tokens: how many tokens the layers "evolutionary" may run on, sets of layers times tokens. noise_db:
    signal-to-noise ratio of the noisy presets. dtype: "keep" or the storage type of the target. untie: give a tied
    head a matrix of its own. stream_scale: see that module.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str = "auto"
    select: Select = "auto"
    readers: Readers = "auto"
    seed: int = Field(default=0, ge=0, lt=2**63)
    layers: str = "auto"
    search_tokens: int = Field(default=2_000_000, ge=1)
    noise_db: float = Field(default=10.0, ge=-100, le=300)
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    untie: bool = False
    stream_scale: StreamScale = 1.0

    def with_layers(self, layers: str) -> Options:
        """Return the same with another layer plan, which no search comes before."""
        return self.model_copy(update={"layers": layers, "search_tokens": Options().search_tokens})


class Source(BaseModel):
    """Which checkpoint a plan was made for: its place and hashes of its config and tensor headers.

    weights_sha256: of its weights (see `calibration.scores.model_sha256`), where they or scores of them chose or fitted
    something; "" where the plan goes for any weights of these shapes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    location: str
    config_sha256: str
    headers_sha256: str
    weights_sha256: str = ""


class Plan(BaseModel):
    """Everything `apply` needs, and nothing it could decide: configs, maps, layers, seed and one recipe a tensor.

    `inexact` lists the reasons why the target does not compute the source's function; empty means exact. `axes` has a
    map for every axis and, where layers or experts differ, one for each ("ffn.3", "ffn.3.5"). `dense` holds the
    matrices that recipes name; they lie beside the JSON, which keeps their hash. `scores_sha256` says what they
    were chosen by, `tokenizer_sha256` whose tokens were cut, where some were: the tokenizer.json of the source.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    format: Literal[1] = FORMAT
    anysize_version: str
    source: Source
    model_type: str
    model_class: str
    options: Options
    source_config: dict[str, Any]
    target_config: dict[str, Any]
    axes: dict[str, AxisMap]
    layers: tuple[LayerStep, ...]
    recipes: tuple[Recipe, ...]
    dropped: dict[str, str]
    notes: tuple[str, ...] = ()
    inexact: tuple[str, ...] = ()
    scores_sha256: str = ""
    tokenizer_sha256: str = ""
    dense_sha256: str = ""
    dense: DenseMaps = Field(default_factory=DenseMaps, exclude=True)

    @property
    def preset(self) -> str:
        return self.options.preset

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def exact(self) -> bool:
        return not self.inexact

    @property
    def keeps_logits(self) -> bool:
        """Whether the logits of the source's tokens, or of those that are kept, are kept: only the softmax differs."""
        return all(reason.startswith("vocab_size ") for reason in self.inexact)

    @property
    def kept_tokens(self) -> AxisMap | None:
        """The map of `vocab` where tokens are cut, else None: `index[new id]` is the token's id in the source."""
        vocab = self.axes.get("vocab")
        return vocab if vocab is not None and vocab.target_size < vocab.source_size else None

    @property
    def num_parameters(self) -> int:
        return sum(prod(recipe.shape) for recipe in self.recipes)

    @property
    def num_bytes(self) -> int:
        return sum(recipe.num_bytes for recipe in self.recipes)

    @property
    def source_num_parameters(self) -> int:
        """Of the whole source, layers and experts that go included."""
        return num_parameters(understand(self.source_config))

    @property
    def source_num_bytes(self) -> int:
        """Of the whole source; what no recipe reads counts as wide as what is read."""
        read = {r.source: (prod(r.source_shape), BYTES[r.source_dtype]) for r in self.recipes}.values()
        count = sum(items for items, _ in read)
        return sum(items * width for items, width in read) * self.source_num_parameters // max(1, count)

    @property
    def peak_bytes(self) -> int:
        """The two largest source tensors and working blocks: what `apply` to disk holds beside the interpreter.

        A tensor that goes through a dense map is held in double precision, before and after.
        """
        sizes = sorted(prod(r.source_shape) * BYTES[r.source_dtype] for r in self.recipes)
        products = [8 * (prod(r.source_shape) + prod(r.shape)) for r in self.recipes if r.reader or r.writer]
        return sum(sizes[-2:]) + max(products, default=0) + self.dense.resident_bytes + (64 << 20)

    def to_json(self) -> str:
        """Return the plan as JSON text; the same plan gives the same text."""
        return json.dumps(self.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, *, origin: str = "the plan") -> Plan:
        """Return the plan that JSON text spells; raise CheckpointError naming every field that does not fit."""
        try:
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            fields = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors()[:5])
            raise CheckpointError(f"'{origin}' is not a plan: {fields}") from error

    def save(self, path: Path) -> None:
        """Write the plan as JSON and its matrices, where it has any, beside it.

        Raises OutputError where that fails; then an earlier plan of that name is as it was.
        """
        require_place(path, with_matrices=bool(self.dense))
        waiting = beside(path).with_name(f".{beside(path).name}.whole")
        with told_of_disk(f"cannot save the plan as '{path}'"):
            try:
                if self.dense:
                    self.dense.save(waiting)
                write_whole({path: self.to_json().encode()})
                if self.dense:
                    waiting.replace(beside(path))
            except OSError:
                waiting.unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan and its matrices from files; raise CheckpointError when they cannot be read or are no plan."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read the plan '{path}': {error}") from error
        plan = cls.from_json(text, origin=str(path))
        if not plan.dense_sha256:
            return plan
        return plan.model_copy(update={"dense": DenseMaps.load(beside(path), plan.dense_sha256)})


def require_place(path: Path, *, with_matrices: bool) -> None:
    """Raise OutputError where a plan cannot be saved, or its matrices would take the place of something else."""
    if path.suffix == ".safetensors":
        raise OutputError(f"cannot save the plan as '{path}': that is where its matrices go, name a .json file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        why = "it is a folder, name a file in it" if path.is_dir() else "its folder does not exist, make it first"
        raise OutputError(f"cannot save the plan as '{path}': {why}")
    if not with_matrices or not beside(path).exists():
        return
    try:
        earlier = bool(json.loads(path.read_text(encoding="utf-8"))["dense_sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        earlier = False
    if not earlier:
        raise OutputError(
            f"cannot save the plan as '{path}': its matrices would take the place of '{beside(path)}', which is no "
            "plan's; choose another name"
        )
