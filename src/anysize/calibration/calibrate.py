"""Calibrate a source: one pass over data, shared between processes, resumed after a kill, into one Scores object."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from anysize.calibration.data import num_places, tokenizer_place
from anysize.calibration.layer_by_layer import LayerByLayer, has_finished
from anysize.calibration.on_disk import BLOCKS, WHAT_IS_KEPT, AveragesOnDisk
from anysize.calibration.run import Collector
from anysize.calibration.scores import Scores, check_output
from anysize.calibration.share import CalibrationOptions, NoBatchError, Share, check_options
from anysize.calibration.sites import widest_site
from anysize.calibration.statistics import BlockSums, SiteSums, averages, block_averages, require_finite
from anysize.config import SourceConfig, understand
from anysize.devices import CPU, chosen_device, device_with
from anysize.errors import AnysizeError, InputError, OutputError
from anysize.io.lock import FolderLock
from anysize.io.reader import Checkpoint, TensorSource
from anysize.io.whole import scratch_folder, told_of_disk
from anysize.memory import fits_in_memory, free_bytes
from anysize.processes import add_up, rank_and_world, wait_for_all
from anysize.progress import Progress
from anysize.proof.coverage import check_source
from anysize.tensors import num_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What is found is kept so often, and less often where keeping it takes long: it may take this share of the time.
_SAVE_EVERY_S = 20.0
_SAVING_SHARE = 0.05


def moment_stride(config: SourceConfig) -> int:
    """Return 1 in how many tokens the second moments see, so that they cost less than the forward pass itself.

    A matrix product of n x n sums costs n^2 multiplications a token and site; the forward pass costs its parameters.
    With experts both are counted as if a token went to all of them: the ratio is nearly the same.
    """
    sizes = config.sizes
    per_token = sizes["layer"] * _moments_of_a_layer(sizes)
    forward = num_parameters(config) - sizes.get("vocab", 0) * sizes["hidden"] * (1 if config.tied else 2)
    return max(1, round(1.25 * per_token / max(1, forward)))


def _moments_of_a_layer(sizes: Mapping[str, int]) -> int:
    """Return how many numbers the second moments of a layer are: at two norms, o_proj and (each expert's) down_proj."""
    heads = sizes["kv"] * sizes["group"] * sizes["head"]
    return 2 * sizes["hidden"] ** 2 + heads**2 + sizes.get("expert", 1) * sizes["ffn"] ** 2


def scores_bytes(config: SourceConfig, *, second_moments: bool) -> int:
    """Return about how many bytes the scores file takes: a matrix for every norm, o_proj and down_proj, in float32."""
    sizes = config.sizes
    heads = sizes["kv"] * sizes["group"] * sizes["head"]
    vectors = sizes["layer"] * (10 * sizes["hidden"] + heads + sizes.get("expert", 1) * sizes["ffn"]) * 4 * 8
    matrices = sizes["layer"] * _moments_of_a_layer(sizes) + sizes["hidden"] ** 2
    return vectors + (4 * matrices if second_moments else 0)


class _Run:
    """The state of one calibration: its share of the batches, its sums, and where they are kept meanwhile."""

    def __init__(self, collector: Collector, place: Path | None, fingerprint: str) -> None:
        self.collector, self.place, self.fingerprint = collector, place, fingerprint
        self.batches_done = self.items_done = 0
        self._saved_at, self._saving_took = time.monotonic(), 0.0

    def resume(self) -> None:
        """Take up the sums of a run that was killed, if they are of the same model, data and options."""
        if self.place is None or not self.place.is_file():
            return
        try:
            with safe_open(self.place, framework="pt") as file:
                state = json.loads((file.metadata() or {}).get("state", "{}"))
                if state.get("fingerprint") != self.fingerprint:
                    return
                # Copied out of the file, which the next save replaces.
                found = _by_site({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError, json.JSONDecodeError):
            return
        self.collector.blocks = BlockSums.of(found.pop(BLOCKS))
        self.collector.sums = {site: SiteSums.of(tensors) for site, tensors in found.items()}
        self.batches_done, self.items_done = state["batches"], state["items"]
        self.collector.aliases.update(state["aliases"])
        self.collector.feeds.update(state["feeds"])

    def sums(self) -> dict[str, torch.Tensor]:
        """Return all sums by name, those of a killed run included."""
        found = {
            f"{site}/{kind}": values
            for site, sums in self.collector.sums.items()
            for kind, values in sums.as_tensors().items()
        }
        return found | {f"{BLOCKS}/{kind}": values for kind, values in self.collector.blocks.as_tensors().items()}

    def finished_batch(self, items: int) -> None:
        self.batches_done += 1
        self.items_done += items
        wait = max(_SAVE_EVERY_S, self._saving_took / _SAVING_SHARE)
        if self.place is not None and time.monotonic() - self._saved_at > wait:
            self.save()

    def save(self) -> None:
        """Keep the sums beside the output, at once under their name; raise OutputError where that fails."""
        assert self.place is not None
        state = {"fingerprint": self.fingerprint, "batches": self.batches_done, "items": self.items_done,
                 "aliases": self.collector.aliases, "feeds": self.collector.feeds}  # fmt: skip
        writing, begin = _writing(self.place), time.monotonic()
        with told_of_disk(f"cannot keep {WHAT_IS_KEPT} as '{self.place}'"):
            save_file(self.sums(), writing, {"state": json.dumps(state)})
            writing.replace(self.place)
        self._saved_at = time.monotonic()
        self._saving_took = self._saved_at - begin


def _by_site(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return tensors named `site/kind` by site and kind."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, values in tensors.items():
        site, _, kind = name.rpartition("/")
        found.setdefault(site, {})[kind] = values
    return found


def _partial(output: Path, rank: int) -> Path:
    """Return where a process keeps its sums until the scores are saved as `output`."""
    return output.with_name(f".{output.name}.rank{rank}.partial")


def _lock(output: Path, rank: int) -> Path:
    """Return what a process locks until the scores are saved as `output`."""
    return output.with_name(f".{output.name}.rank{rank}.lock")


def _writing(place: Path) -> Path:
    return place.with_name(f"{place.name}.writing")


def _folder(place: Path) -> Path:
    """Return where a process that goes layer by layer keeps what it has found meanwhile."""
    return place.with_suffix(".layers")


def _removed(place: Path | None) -> None:
    for file in [] if place is None else [place, _writing(place)]:
        # Where not even this is possible, why the output could not be written is what has to be told.
        with suppress(OSError):
            file.unlink()
    if place is not None:
        shutil.rmtree(_folder(place), ignore_errors=True)


def _removed_of_all(output: Path) -> None:
    """Remove what any process kept for this output: of a run that was killed there may have been more than now."""
    kept = re.compile(rf"\.{re.escape(output.name)}\.rank(\d+)\.(layers|lock|partial|partial\.writing)")
    # The scores are saved: a folder that cannot be listed changes nothing about that.
    with suppress(OSError):
        for rank in {
            int(match[1]) for path in output.absolute().parent.iterdir() if (match := kept.fullmatch(path.name))
        }:
            _removed(_partial(output, rank))
            # That of this process goes when it is released.
            if rank:
                _lock(output, rank).unlink(missing_ok=True)


@contextmanager
def _removed_on_refusal(place: Path | None) -> Generator[None]:
    """While active, an error of ours leaves nothing there; what a kill leaves is there to go on from.

    So is what is finished where the output failed: the same command goes on once there is room.
    """
    try:
        yield
    except OutputError:
        if place is not None:
            with suppress(OSError):
                _writing(place).unlink()
        raise
    except AnysizeError:
        _removed(place)
        raise


def collect(
    tensors: TensorSource,
    model: PreTrainedModel,
    data: str,
    tokenizer: str,
    options: CalibrationOptions,
    *,
    keep_at: Path | None = None,
    progress: Progress,
) -> Scores:
    """Run the model over its share of the data and return the averages over all of it.

    `tokenizer` is where it lies, "" for beside the source. Sums are kept at `keep_at` meanwhile, so that a killed run
    goes on where it was; whoever saves the scores removes them. `shared` by the processes of a torchrun, each takes
    every n-th batch, and all return the same scores.
    """
    share = Share(tensors, data, tokenizer, options)
    with _removed_on_refusal(keep_at):
        share.require_batches()
    stride = moment_stride(share.config) if options.second_moments else 1
    collector = Collector(model, share.config, second_moments=options.second_moments, stride=stride)
    run = _Run(collector, keep_at, share.fingerprint)
    run.resume()
    total, world = options.data.tokens, share.world

    def report(items: int) -> None:
        run.finished_batch(items)
        progress("calibrate", min(total, run.items_done * world), total)

    progress("calibrate", run.items_done * world, total)
    with _removed_on_refusal(keep_at):
        with collector.attached():
            collector.run(share.batches(run.batches_done), report)
        if options.leave_one_out and keep_at is not None:
            # It may take longer than all before it. Kept now: the sums of all processes are added up in place.
            run.save()
        sums = run.sums()
        if options.shared:
            add_up(sums[name] for name in sorted(sums))
        require_finite(_by_site(sums))
        blocks: dict[str, torch.Tensor] = {}
        if options.leave_one_out:
            blocks = _without_layers(model, share, progress)
    sites = _by_site(sums)
    layers = sites.pop(BLOCKS)
    record = share.record(sites, layers, collector.aliases, collector.feeds)
    return Scores(record, {site: averages(found) for site, found in sites.items()}, block_averages(layers) | blocks)


def _without_layers(model: PreTrainedModel, share: Share, progress: Progress) -> dict[str, torch.Tensor]:
    """Return the score of the layers that is the loss without each."""
    from anysize.calibration.leave_one_out import batches_with_loss, losses_without_layers  # noqa: PLC0415

    again = batches_with_loss(share.data, share.config, share.place, share.options.data)
    return {"leave-one-out": losses_without_layers(model, share.config, again, progress)}


def _share_layer_by_layer(
    tensors: TensorSource, data: str, tokenizer: str, options: CalibrationOptions, place: Path | None, *, low: bool
) -> Share | None:
    """Return what is to be calibrated layer by layer, None where the whole model is run.

    Where layers are finished, they are gone on from, whatever memory is free by now. low: weights stay on disk.
    """
    if not isinstance(tensors, Checkpoint):
        return None
    short = low or not _sums_fit(tensors, options)
    if not short and (place is None or not _folder(place).is_dir()):
        return None
    share = Share(tensors, data, tokenizer, options, way="layer by layer")
    return share if short or (place is not None and has_finished(_folder(place), share)) else None


def _collect_layer_by_layer(
    share: Share, scratch: Path, device: torch.device, *, low: bool, keep_at: Path | None, progress: Progress
) -> Scores:
    """Return what `collect` does, with one layer and its sums in memory; the scores lie in files until they are read.

    What is found is kept at `keep_at`, so that a killed run goes on with the layer that it was at. `device` and `low`
    are those of `running_place`.
    """
    options = share.options
    stride = moment_stride(share.config) if options.second_moments else 1
    with _removed_on_refusal(keep_at):
        share.require_batches()
        run = LayerByLayer(share, scratch / "layers" if keep_at is None else _folder(keep_at), device)
        sites, layers, notes = run.run(progress, stride=stride)
        blocks: dict[str, torch.Tensor] = {}
        if options.leave_one_out:
            blocks = _without_layers(loaded_source(share.tensors, scratch, device, low=low), share, progress)
    record = share.record(sites, layers, notes.aliases, notes.feeds)
    return Scores(record, {site: AveragesOnDisk(sums) for site, sums in sites.items()}, block_averages(layers) | blocks)


@contextmanager
def mode_kept(tensors: TensorSource) -> Generator[None]:
    """While active, a source in memory may be put into another mode; afterwards each module is in its own again."""
    model = getattr(tensors, "model", None)
    training = [] if model is None else [module for module in model.modules() if module.training]
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batch_bytes(config: SourceConfig, options: CalibrationOptions, *, logits: bool) -> int:
    """Return about how many bytes one batch takes beside the weights, in single precision.

    They are the residual stream before and after every layer, a layer at work, one second moment and, where the head
    runs, logits with their probabilities.
    """
    sizes = config.sizes
    widest = widest_site(sizes)
    rows = options.data.batch_size * num_places(config, options.data.sequence_length)
    a_row = (sizes["layer"] + 1) * sizes["hidden"] + 4 * widest + (3 * sizes.get("vocab", 0) if logits else 0)
    return 4 * (rows * a_row + widest**2)


def running_place(
    tensors: TensorSource, options: CalibrationOptions, *, logits: bool = False
) -> tuple[torch.device, bool]:
    """Return where a source runs, and whether its weights stay on disk meanwhile.

    logits: the head runs as well. Raises InputError where it cannot run on the device that is named.
    """
    from anysize.io.models import LoadedModel  # noqa: PLC0415

    config = understand(tensors.config)
    device = chosen_device(options.device)
    if options.low_memory and options.device not in ("auto", "cpu"):
        raise InputError(f"low_memory runs the model from disk, on the CPU: leave the device '{device}' out")
    if isinstance(tensors, LoadedModel):
        there = tensors.model.device
        other = device.type != there.type or device.index not in (None, there.index)
        if options.device != "auto" and other:
            raise InputError(f"the device is '{device}', and the model is loaded already, on '{tensors.model.device}'")
        return there, False
    weights = 4 * num_parameters(config)
    if options.device == "auto":
        device = device_with(_batch_bytes(config, options, logits=logits), known=weights)
    if not isinstance(tensors, Checkpoint):
        return device, False
    # What goes on to an accelerator has to pass through this memory, but does not stay there.
    passes = device.type != "cpu" and weights <= free_bytes()
    low = options.low_memory or not (passes or fits_in_memory(num_parameters(config)))
    if low and device.type != "cpu" and options.device != "auto":
        raise InputError(
            f"'{tensors.location}' does not fit into free memory on its way to '{device}': free some, or leave the "
            "device out, and it runs from disk"
        )
    return CPU if low else device, low


def _sums_fit(tensors: TensorSource, options: CalibrationOptions) -> bool:
    """Whether the sums of all layers, in double precision, take at most half of the memory that is free now."""
    return 2 * scores_bytes(understand(tensors.config), second_moments=options.second_moments) <= free_bytes() / 2


def loaded_source(tensors: TensorSource, scratch: Path, device: torch.device, *, low: bool) -> PreTrainedModel:
    """Return the source as a stock model in float32, where `running_place` said: weights left on disk lie in `scratch`.

    Raises InputError where it does not fit there.
    """
    from anysize.io.models import LoadedModel, build_model  # noqa: PLC0415
    from anysize.proof.parity import load  # noqa: PLC0415

    config = understand(tensors.config)
    check_source(config, tensors)
    if isinstance(tensors, LoadedModel):
        return tensors.model.eval()
    model: Any
    if isinstance(tensors, Checkpoint):
        model = load(tensors.folder, config.model_class, scratch=scratch if low else None)
    else:
        found = {name: tensors.read(name) for name in tensors.tensors}
        model = build_model(config.model_class, tensors.config, found, torch.float32)
    try:
        return model if low else model.to(device)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"'{tensors.location}' takes {4e-9 * num_parameters(config):.1f} GB in single precision, more than is free "
            f"on '{device}': free some, or leave the device out, and it runs where there is room"
        ) from error


def calibrated(
    tensors: TensorSource,
    data: str,
    options: CalibrationOptions,
    *,
    tokenizer: str = "",
    output: Path | None = None,
    progress: Progress,
) -> Scores:
    """Load the source, collect its scores and, where an output is named, write them (from the first process only).

    Raises InputError for what cannot be calibrated, OutputError for an output that cannot be written or that another
    process is at work on, before anything is loaded where that can be known by then.
    """
    rank = rank_and_world()[0] if options.shared else 0
    if output is not None:
        check_output(output)
    check_options(tensors, tokenizer, options)
    try:
        # A second one would take up, and at its end remove, what the first one keeps meanwhile.
        with nullcontext() if output is None else FolderLock(output, _lock(output, rank)):
            return _calibrated(tensors, data, options, tokenizer, output, rank, progress)
    except NoBatchError:
        # The first to end has torchrun end the others, who might still be at cleaning up.
        wait_for_all()
        raise


def _calibrated(
    tensors: TensorSource,
    data: str,
    options: CalibrationOptions,
    tokenizer: str,
    output: Path | None,
    rank: int,
    progress: Progress,
) -> Scores:
    """Do what `calibrated` promises, alone at the output."""
    place = None if output is None else _partial(output, rank)
    if options.leave_one_out:
        from anysize.calibration.leave_one_out import require_loss  # noqa: PLC0415

        require_loss(understand(tensors.config), data, tokenizer_place(tensors, tokenizer), options.data)
    with scratch_folder() as scratch, mode_kept(tensors):
        device, low = running_place(tensors, options, logits=options.leave_one_out)
        share = _share_layer_by_layer(tensors, data, tokenizer, options, place, low=low)
        if share is not None:
            scores = _collect_layer_by_layer(share, scratch, device, low=low, keep_at=place, progress=progress)
        else:
            model = loaded_source(tensors, scratch, device, low=low)
            scores = collect(tensors, model, data, tokenizer, options, keep_at=place, progress=progress)
    with _removed_on_refusal(place):
        if output is not None and rank == 0:
            scores.save(output)
    if options.shared:
        # Others would say that they are done, or remove what they have found, while the first one still writes.
        wait_for_all()
    _removed(place)
    if output is not None and rank == 0:
        _removed_of_all(output)
    return scores
