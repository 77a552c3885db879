"""Calibrate with one layer in memory: its weights are read once, all batches go through it, its sums go to a file.

The streams between two layers lie in a file as well. What is held is one layer, its sums, one batch, and what stands
around the layers, however many of these there are. The numbers are those of a run of the whole model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from anysize.calibration.data import Batch
from anysize.calibration.on_disk import BLOCKS, WHAT_IS_KEPT, KindsOnDisk, RowsOnDisk, by_site, keeping
from anysize.calibration.replay import Layers
from anysize.calibration.run import Collector, num_items
from anysize.calibration.share import Share
from anysize.calibration.statistics import BlockSums, ends, require_finite
from anysize.dense import stored_arrays
from anysize.devices import CPU
from anysize.errors import InputError, OutputError
from anysize.io.tensor_file import save_one_by_one
from anysize.processes import add_up
from anysize.progress import Progress
from anysize.proof.coverage import check_source
from anysize.stored import ScratchArrays, StoredArrays

_STATE, _AROUND = "state", "around"
_INFLUENCE, _MAGNITUDE = f"{BLOCKS}/influence", f"{BLOCKS}/magnitude"


@dataclass
class Notes:
    """What is told of a part of the model beside its sums. `norm`: the one that gave the stream it leaves, or ""."""

    aliases: dict[str, str] = field(default_factory=dict)
    feeds: dict[str, str] = field(default_factory=dict)
    norm: str = ""


class _Kept:
    """The folder of a run: a file of sums for every layer that is finished, and the stream that the last one left."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder, self.fingerprint = folder, fingerprint

    def sums(self, part: int | str) -> Path:
        return self.folder / f"sums-{part}.safetensors"

    def stream(self, layer: int) -> Path:
        """Return where the stream lies that a layer reads."""
        return self.folder / f"stream-{layer}"

    @property
    def ends(self) -> Path:
        """Return where the ends of all streams lie, one layer after the other."""
        return self.folder / "ends"

    def _state(self, part: int | str) -> dict[str, Any] | None:
        """Return what was told of a part, None where it is not finished, or was by other work."""
        try:
            with safe_open(self.sums(part), framework="pt") as file:
                state = json.loads((file.metadata() or {}).get(_STATE, "{}"))
        except (SafetensorError, OSError, json.JSONDecodeError):
            return None
        return state if state.get("fingerprint") == self.fingerprint else None

    def finished(self, num_layers: int) -> list[Notes]:
        """Return what was told of the layers that are finished; none are where what they left is not there whole."""
        found: list[dict[str, Any]] = []
        while len(found) < num_layers and (state := self._state(len(found))) is not None:
            found.append(state)
        try:
            left, ends = found[-1]["bytes"] if found else (0, 0)
            # A layer that was not finished has added its own to the ends.
            if self.stream(len(found)).stat().st_size != left or self.ends.stat().st_size < ends:
                return []
        except OSError:
            return []
        return [Notes(**state["notes"]) for state in found]

    def drop_unfinished(self, num_layers: int) -> list[Notes]:
        """Return what was told of the layers that are finished; remove what is half written, all where none is."""
        found = self.finished(num_layers)
        if not found:
            shutil.rmtree(self.folder, ignore_errors=True)
        for layer in range(num_layers + 1):
            if found and layer != len(found):
                # Where not even this is possible, what is kept is still whole.
                with suppress(OSError):
                    self.stream(layer).unlink(missing_ok=True)
        return found

    def resume(self, num_layers: int) -> list[Notes]:
        """Return what was told of the layers that are finished; where there are none, the folder is empty."""
        if not (found := self.drop_unfinished(num_layers)):
            with keeping(self.folder):
                self.folder.mkdir(parents=True)
        return found

    def save(
        self, part: int | str, sums: dict[str, torch.Tensor], notes: Notes, left: tuple[int, int] = (0, 0)
    ) -> None:
        """Write the sums of a part, at once under their name: then it is finished.

        left: how many bytes of stream and of ends it leaves to the next one.
        """
        state = {"fingerprint": self.fingerprint, "notes": vars(notes), "bytes": left}
        entries = ((name, "F64", tuple(v.shape), 8 * prod(v.shape)) for name, v in sums.items())
        with keeping(self.folder):
            save_one_by_one(
                self.sums(part), entries, lambda name: sums[name].numpy().data, {_STATE: json.dumps(state)}, synced=True
            )


def has_finished(folder: Path, share: Share) -> bool:
    """Whether a killed run of this share has finished a layer there."""
    return bool(_Kept(folder, share.fingerprint).finished(share.config.sizes["layer"]))


class LayerByLayer:
    """One process's share of a calibration, kept in a folder; a killed one goes on with the layer that it was at."""

    def __init__(self, share: Share, folder: Path, device: torch.device = CPU) -> None:
        """Raise CheckpointError where the source does not hold what its config says."""
        names, _ = check_source(share.config, share.tensors)
        self.share, self.kept = share, _Kept(folder, share.fingerprint)
        self.layers = Layers(share.config, lambda name: share.tensors.read(names[name]), device)
        self.blocks = BlockSums(share.config.sizes["layer"])
        # Of each batch its first sequence and their number; of each sequence its shape.
        self._places: list[tuple[int, int]] = []
        self._shape: tuple[int, ...] = ()

    def run(self, progress: Progress, *, stride: int) -> tuple[dict[str, KindsOnDisk], dict[str, torch.Tensor], Notes]:
        """Return the sums of all processes by site, unread, those of the layers, and what is told beside them.

        stride: second moments see every so many-th token. Raises InputError for data that cannot be used, OutputError
        where the folder cannot hold what is found.
        """
        try:
            notes = self._run(progress, stride)
        except OutputError:
            # As after a kill the same command goes on, once there is room: what does not help it, takes none.
            self.kept.drop_unfinished(self._num_layers)
            raise
        arrays = [stored_arrays(self.kept.sums(part)) for part in (*range(self._num_layers), _AROUND)]
        sites, layers = _added_up(arrays, self.blocks.as_tensors(), self.kept.folder if self.share.world > 1 else None)
        return sites, layers, notes

    @property
    def _num_layers(self) -> int:
        return self.share.config.sizes["layer"]

    @torch.no_grad()
    def _run(self, progress: Progress, stride: int) -> Notes:
        done = self.kept.resume(self._num_layers)
        collector = Collector(
            self.layers.model, self.share.config, second_moments=self.share.options.second_moments, stride=stride
        )
        last = RowsOnDisk(self.kept.ends)
        items = self._start(last, write=not done)
        total = items * self.share.world
        progress("calibrate", total * len(done) // self._num_layers, total)
        norm = done[-1].norm if done else ""
        for layer in range(len(done), self._num_layers):
            run = layer * len(self._places)

            def report(batch: int, run: int = run) -> None:
                steps = self._num_layers * len(self._places)
                progress("calibrate", total * (run + batch + 1) // steps, total)

            done.append(self._layer(layer, norm, collector, last, report))
            norm = done[-1].norm
        self._around(norm, collector)
        self._block_sums(last)
        return Notes(
            {a: b for notes in done for a, b in notes.aliases.items()} | collector.aliases,
            {a: b for notes in done for a, b in notes.feeds.items()} | collector.feeds,
        )

    def _start(self, last: RowsOnDisk, *, write: bool) -> int:
        """Learn how layers are called and what the first of them reads; return how many items the batches hold."""
        stream, items = RowsOnDisk(self.kept.stream(0)) if write else None, 0

        def counted() -> Iterator[Batch]:
            nonlocal items
            for batch in self.share.batches():
                items += num_items(batch)
                yield batch

        def keep(hidden: torch.Tensor) -> None:
            first = sum(self._places[-1]) if self._places else 0
            assert self._shape in ((), hidden.shape[1:]), "every batch is a full rectangle, as long as the others"
            self._shape = tuple(hidden.shape[1:])
            self._places.append((first, len(hidden)))
            if stream is not None:
                stream.write(first, hidden)
                last.write(first, ends(hidden))

        self.layers.start(counted(), keep)
        return items

    def _layer(self, layer: int, norm: str, collector: Collector, last: RowsOnDisk, report: Any) -> Notes:
        """Take all batches through one layer and keep its sums; `norm` gave what it reads, if any did."""
        before, after = (RowsOnDisk(self.kept.stream(at)) for at in (layer, layer + 1))
        sequences, leaves = sum(self._places[-1]), ""
        collector.aliases, collector.feeds = {}, {}
        with self.layers.layer(layer), collector.attached({layer}):
            for batch, (first, count) in enumerate(self._places):
                read = before.read(first, count, self._shape).to(self.layers.device)
                with collector.batch(count):
                    collector.comes_from(read, norm)
                    made = self.layers.after(layer, batch, read)
                    leaves = collector.norm_of(made)
                self.blocks.add_layer(layer, read, made)
                last.write((layer + 1) * sequences + first, ends(made))
                after.write(first, made)
                report(batch)
        notes = Notes(collector.aliases, collector.feeds, leaves)
        of_layer = {_INFLUENCE: self.blocks.influence[layer : layer + 1].clone(),
                    _MAGNITUDE: self.blocks.magnitude[layer : layer + 1].clone()}  # fmt: skip
        # A power loss must not leave this layer finished and what it left unfinished.
        after.sync()
        last.sync()
        width = 4 * self._shape[-1] * sequences
        self.kept.save(layer, _told(collector) | of_layer, notes, (width * prod(self._shape[:-1]), width * (layer + 2)))
        collector.sums = {}
        self.kept.stream(layer).unlink(missing_ok=True)
        return notes

    def _around(self, norm: str, collector: Collector) -> None:
        """Collect what stands before and after the layers."""
        stream = RowsOnDisk(self.kept.stream(self._num_layers))
        collector.aliases, collector.feeds = {}, {}
        seen = 0
        with self.layers.around(), collector.attached({None}):
            for batch in self.share.batches():
                first, count = self._places[seen] if seen < len(self._places) else (0, 0)
                if len(next(iter(batch.values()))) != count:
                    break
                hidden = stream.read(first, count, self._shape).to(self.layers.device)
                with collector.batch(count):
                    collector.comes_from(hidden, norm)
                    self.layers.end(batch, hidden)
                seen += 1
            else:
                if seen == len(self._places):
                    self.kept.save(_AROUND, _told(collector), Notes(collector.aliases, collector.feeds))
                    collector.sums = {}
                    return
        raise InputError(f"the data '{self.share.data}' changed while they were read: calibrate again")

    def _block_sums(self, last: RowsOnDisk) -> None:
        """Complete the sums of the layers: those that an earlier process found, and the angles between all layers."""
        for layer in range(self._num_layers):
            arrays = stored_arrays(self.kept.sums(layer))
            self.blocks.influence[layer] = float(arrays[_INFLUENCE][0])
            self.blocks.magnitude[layer] = float(arrays[_MAGNITUDE][0])
        sequences, width = sum(self._places[-1]), self._shape[-1:]
        for first, count in self._places:
            rows = [last.read(at * sequences + first, count, width) for at in range(self._num_layers + 1)]
            self.blocks.add_ends(torch.stack(rows, 1), self._shape[0])


def _told(collector: Collector) -> dict[str, torch.Tensor]:
    """Return the sums that a collector holds, by name; raise InputError where some are no numbers."""
    found = {site: sums.as_tensors() for site, sums in collector.sums.items()}
    require_finite(found)
    return {f"{site}/{kind}": values for site, sums in found.items() for kind, values in sums.items()}


def _added_up(
    arrays: list[StoredArrays], blocks: dict[str, torch.Tensor], folder: Path | None
) -> tuple[dict[str, KindsOnDisk], dict[str, torch.Tensor]]:
    """Return the sums of the sites and of the layers over all processes, one matrix in memory at a time.

    folder: keeps what is added up, None for one process alone.
    """
    places = {name: file for file in arrays for name in file if not name.startswith(f"{BLOCKS}/")}
    if folder is not None:
        # Not in place: a run that is killed meanwhile goes on from its own sums.
        scratch = ScratchArrays(folder, WHAT_IS_KEPT)
        named = {f"{BLOCKS}/{kind}": values for kind, values in blocks.items()}

        def one_by_one() -> Iterator[torch.Tensor]:
            for name in sorted([*places, *named]):
                values = named[name] if name in named else torch.from_numpy(places[name][name])
                yield values
                # By the time that the next one is asked for, this one is the sum of all processes.
                if name not in named:
                    scratch[name] = values.numpy()

        add_up(one_by_one())
        arrays = [scratch]
    found = {site: kinds for file in arrays for site, kinds in by_site(file).items()}
    found.pop(BLOCKS, None)
    return found, blocks
