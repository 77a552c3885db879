"""Scores: what calibration found, in one safetensors file that serves every target size of its source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from anysize.calibration.on_disk import BLOCKS, KindsOnDisk, OnDisk, by_site
from anysize.calibration.sites import sites
from anysize.config import SourceConfig, understand
from anysize.dense import stored_arrays
from anysize.errors import CheckpointError, OutputError, joined
from anysize.io.reader import Checkpoint, TensorSource, read_ranges
from anysize.io.tensor_file import Entry, save_one_by_one
from anysize.io.whole import told_of_disk
from anysize.memory import fits_in_memory
from anysize.tensors import dim_size

_RECORD, _DIGESTS = "anysize", "sha256"
# Of a model's weights so much is hashed: tensors up to this size, and so many rows of larger ones.
_WHOLE_ITEMS, _SAMPLED_ROWS = 16_384, 256
# Scores of format 1 know less of their model and nothing of their data; of format 2, not what each expert saw; of
# format 3, not where sequences end at modules that see all their tokens in one row; of format 4, less of large tensors,
# and not what the norms that end branches, class tokens and positions of images write.
FORMAT = 5


class Record(BaseModel):
    """Where scores come from: hashes of the model and the data, how much of them was read, and who shares whose input.

    `data` and `tokenizer` are absolute paths or Hub ids, so that they can be read again; without a `tokenizer` it lies
    beside the source. `data_sha256` is of the first tokens or images. `samples` counts the activations in each second
    moment; those of one expert are fewer, see its statistic of that name. `aliases` maps a site to the site that saw
    the same tensor (k_proj reads what q_proj reads); `feeds` a site to the norm whose output it saw.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[5] = FORMAT
    model_sha256: str
    model_type: str
    source: str
    data: str
    data_sha256: str
    column: str = ""
    tokenizer: str = ""
    tokens: int
    sequence_length: int
    batch_size: int
    second_moments: bool
    samples: int
    aliases: dict[str, str]
    feeds: dict[str, str]


def check_output(path: Path) -> None:
    """Raise OutputError where scores could not be saved, before hours are spent on them."""
    if path.is_dir():
        raise OutputError(f"cannot save the scores as '{path}': it is a folder, name a file in it")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"cannot save the scores as '{path}': its folder does not exist, make it first")
    if not path.name.endswith(".safetensors"):
        raise OutputError(
            f"cannot save the scores as '{path}': called like that they would be read as data, name a .safetensors file"
        )
    if path.exists() and not _holds_scores(path):
        raise OutputError(
            f"cannot save the scores as '{path}': they would take the place of a file that holds no scores; choose "
            "another name"
        )


def _holds_scores(path: Path) -> bool:
    """Whether a file is one of scores, of whatever format."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get(_RECORD, ""))
    except (OSError, SafetensorError, ValueError):
        return False
    return isinstance(told, dict) and "model_sha256" in told


@dataclass(frozen=True)
class Scores:
    """Averages over the calibration tokens, by site, and scores of the layers, by kind. All tensors are float64."""

    record: Record
    sites: Mapping[str, Mapping[str, torch.Tensor]]
    blocks: Mapping[str, torch.Tensor]

    def of(self, site: str, statistic: str) -> torch.Tensor:
        """Return one statistic of a site; raise CheckpointError where the scores lack it."""
        found = self.sites.get(self.record.aliases.get(site, site), {}).get(statistic)
        if found is None:
            more = "; calibrate again with second moments" if statistic == "second" else ""
            raise CheckpointError(f"the scores hold no '{statistic}' of '{site}'{more}")
        return found

    def block(self, kind: str) -> torch.Tensor:
        """Return the scores of the layers of one kind; raise CheckpointError where the file lacks them."""
        if kind not in self.blocks:
            raise CheckpointError(f"the scores hold no '{kind}' of the layers: they hold {', '.join(self.blocks)}")
        return self.blocks[kind]

    @cached_property
    def sha256(self) -> str:
        """Hash of everything in the scores: what a plan remembers of them."""
        digest = hashlib.sha256(self.record.model_dump_json().encode())
        for name, tensor in self._flat():
            digest.update(name.encode())
            digest.update(tensor.numpy().data)
        return digest.hexdigest()

    def _flat(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield what the file holds, by name: matrices in single precision, which halves what is mostly matrices."""
        for name, of in sorted(self._places().items()):
            yield name, self._stored(*of)

    def _places(self) -> dict[str, tuple[Mapping[str, torch.Tensor], str]]:
        every = {**self.sites, BLOCKS: self.blocks}
        return {f"{site}/{kind}": (kinds, kind) for site, kinds in every.items() for kind in kinds}

    @staticmethod
    def _stored(kinds: Mapping[str, torch.Tensor], kind: str) -> torch.Tensor:
        tensor = kinds[kind]
        return (tensor.float() if tensor.dim() > 1 else tensor.double()).contiguous()

    def save(self, path: Path) -> None:
        """Write the file at once under its name; raise OutputError where that fails."""
        places = self._places()

        def entry(name: str) -> Entry:
            size = _shape_of(*places[name])
            wide = len(size) < 2
            return name, "F64" if wide else "F32", size, prod(size) * (8 if wide else 4)

        with told_of_disk(f"cannot save the scores as '{path}'"):
            save_one_by_one(
                path, map(entry, places), lambda name: self._stored(*places[name]).numpy().data,
                {_RECORD: self.record.model_dump_json()}, digests=_DIGESTS,
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path, *, low_memory: bool = False) -> Scores:
        """Read a scores file; with `low_memory`, or where it is large, each statistic only when it is asked for.

        Raises CheckpointError where it is none or is damaged, or, later, where it has become another file.
        """
        if not path.exists():
            raise CheckpointError(
                f"the scores file '{path}' does not exist: make it with anysize calibrate SOURCE DATA --output '{path}'"
            )
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
            record = _record(told.get(_RECORD, ""), path)
            sites, blocks = _on_disk(path, json.loads(told.get(_DIGESTS, "{}")))
            if low_memory or not fits_in_memory(path.stat().st_size // 2):
                return cls(record, sites, blocks)
            return cls(record, {site: dict(kinds) for site, kinds in sites.items()}, dict(blocks))
        except (OSError, SafetensorError, ValidationError, json.JSONDecodeError) as error:
            why = " ".join(str(error).split())[:200]
            raise CheckpointError(f"'{path}' is not a scores file that anysize calibrate wrote: {why}") from error

    def require_model(self, tensors: TensorSource) -> None:
        """Raise CheckpointError where the scores were made for another model, or are not as large as its axes."""
        if self.record.model_sha256 != model_sha256(tensors):
            raise CheckpointError(
                f"the scores were made for another model ('{self.record.source}', a {self.record.model_type}) than "
                f"'{tensors.location}': its config or weights differ; calibrate this one"
            )
        wanted = _shapes(self._places(), understand(tensors.config))
        wrong = [
            f"'{name}' has shape {list(found)}, wanted {list(wanted[name]) if name in wanted else 'none of that name'}"
            for name, of in self._places().items()
            if (found := _shape_of(*of)) != wanted.get(name)
        ]
        if wrong:
            raise CheckpointError(
                f"the scores of '{tensors.location}' are damaged: {joined(wrong[:3])}; calibrate again"
            )


def _record(text: str, path: Path) -> Record:
    """Return the record of a scores file; raise CheckpointError where another version wrote it."""
    told = json.loads(text)
    if isinstance(told, dict) and told.get("format") != FORMAT:
        raise CheckpointError(
            f"the scores '{path}' are of format {told.get('format')}, this version reads {FORMAT}: calibrate again"
        )
    return Record.model_validate_json(text)


def _on_disk(path: Path, digests: object) -> tuple[dict[str, KindsOnDisk], Mapping[str, torch.Tensor]]:
    """Return the sites and the blocks of a scores file, unread; each is held against its digest when it is read.

    Raises CheckpointError where others are there than were written.
    """
    arrays = stored_arrays(path, digests if isinstance(digests, dict) else {})
    if not isinstance(digests, dict) or digests.keys() != arrays.keys():
        raise CheckpointError(f"the scores '{path}' are damaged: they do not hold what was written; calibrate again")
    sites = by_site(arrays)
    return sites, sites.pop(BLOCKS, {})


def _shape_of(kinds: Mapping[str, torch.Tensor], kind: str) -> tuple[int, ...]:
    """Return the shape of one statistic, without reading it."""
    return kinds.shape_of(kind) if isinstance(kinds, OnDisk) else tuple(kinds[kind].shape)


def _shapes(names: Iterable[str], config: SourceConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that statistics of these names have of a model; names it has no place for are left out."""
    sizes, known = config.sizes, sites(config)
    layers, found = sizes["layer"], dict[str, tuple[int, ...]]()
    for name in names:
        site, _, kind = name.rpartition("/")
        if site == BLOCKS:
            found[name] = (layers + 1, layers + 1) if kind == "angular" else (layers,)
        elif site in known:
            size = dim_size(known[site].dim, sizes)
            found[name] = {"second": (size, size), "samples": (1,)}.get(kind, (size,))
    return found


def model_sha256(tensors: TensorSource) -> str:
    """Return a hash of a model's config, headers and some rows of every tensor: it tells checkpoints apart.

    The rows are spread from the first to the last, because training may leave some as they were (the embeddings of
    tokens that never came), and others as few as the neurons that somebody pruned. An edit of rows between them goes
    unseen: to read all of a large model would take as long as to load it.
    """
    digest = hashlib.sha256(f"{tensors.config_sha256}{tensors.headers_sha256}".encode())
    for name in sorted(tensors.tensors):
        for part in _parts(tensors, name):
            digest.update(part.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _parts(tensors: TensorSource, name: str) -> Iterator[torch.Tensor]:
    """Yield all of a small tensor, some rows of a large one."""
    shape = tensors.tensors[name].shape
    if prod(shape) <= _WHOLE_ITEMS:
        yield tensors.read(name)
        return
    rows = sorted({i * (shape[0] - 1) // (_SAMPLED_ROWS - 1) for i in range(_SAMPLED_ROWS)})
    if isinstance(tensors, Checkpoint):
        yield from read_ranges(tensors.tensors[name], ((row, 1) for row in rows))
    else:
        # What is in memory may lie on a GPU, and comes from there as a whole.
        read = tensors.read(name)
        yield from (read[row] for row in rows)
