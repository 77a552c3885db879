"""What a calibration is asked for, and what one of its processes takes of it: which batches, known by which hash."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from anysize.calibration.data import Batch, DataOptions, batches, located, sampled, tokenizer_place
from anysize.calibration.scores import FORMAT, Record, model_sha256
from anysize.calibration.statistics import COUNT
from anysize.config import understand
from anysize.errors import InputError
from anysize.io.models import other_ids
from anysize.io.reader import TensorSource
from anysize.io.rows import identity
from anysize.processes import add_up, rank_and_world
from anysize.vocabulary.tokenizer_file import TOKENIZER


@dataclass(frozen=True)
class CalibrationOptions:
    """What is collected, and how: see `anysize.calibrate`.

    shared: under torchrun every process takes a share, so every process has to be there.
    """

    data: DataOptions = field(default_factory=DataOptions)
    second_moments: bool = True
    leave_one_out: bool = False
    low_memory: bool = False
    device: str = "auto"
    shared: bool = True


def check_options(tensors: TensorSource, tokenizer: str, options: CalibrationOptions) -> None:
    """Raise InputError for options that would do nothing, and for sequences longer than the model has positions for.

    Neither the weights nor the data are looked at.
    """
    config = understand(tensors.config)
    images = config.architecture.modality == "image"
    if images and tokenizer:
        raise InputError(f"the tokenizer '{tokenizer}' would do nothing: '{tensors.location}' reads images")
    length, labels = options.data.sequence_length, options.data.label_column
    if images and length != DataOptions().sequence_length:
        raise InputError(f"a sequence length of {length} would do nothing: '{tensors.location}' reads images")
    if labels != DataOptions().label_column and not (images and options.leave_one_out):
        raise InputError(f"label_column='{labels}' would do nothing: labels are read of images, for leave_one_out")
    if not images and config.num_positions is not None and length > config.num_positions:
        raise InputError(
            f"sequences of {length} tokens are too long: '{tensors.location}' has {config.num_positions} positions; "
            "give a --sequence-length of at most that"
        )


class NoBatchError(InputError):
    """Some process of several has no batch. All of them raise it together, so that they can wait for each other."""


class Share:
    """The batches of one process, and a `fingerprint` that tells its work from any other.

    place: where the tokenizer, or the image processor, lies.
    """

    def __init__(
        self, tensors: TensorSource, data: str, tokenizer: str, options: CalibrationOptions, way: str = ""
    ) -> None:
        """Look at the first of the data. `way`: how they are run, where that leaves something else to go on from.

        Raises InputError for data that cannot be used, and for options that would do nothing.
        """
        self.tensors, self.options, self.config = tensors, options, understand(tensors.config)
        self.rank, self.world = rank_and_world() if options.shared else (0, 1)
        self.images = self.config.architecture.modality == "image"
        check_options(tensors, tokenizer, options)
        self._model_sha256 = model_sha256(tensors)
        self.data, self.tokenizer = located(data), located(tokenizer)
        self.place = tokenizer_place(tensors, self.tokenizer)
        own = tokenizer_place(tensors)
        if self.tokenizer and (Path(own) / TOKENIZER).is_file() and (differ := other_ids(own, self.place)):
            raise InputError(f"the tokenizer '{tokenizer}' is not that of '{tensors.location}': {differ}")
        self._data_sha256, every = sampled(self.everything(), options.data.tokens)
        self._begun: Iterator[Batch] | None = every
        data_now = identity(self.data, images=self.images)
        told = [
            FORMAT, self._model_sha256, self.data, data_now, self._data_sha256, asdict(options), self.world, self.rank
        ]  # fmt: skip
        self.fingerprint = hashlib.sha256(json.dumps([*told, *([way] if way else [])]).encode()).hexdigest()

    def everything(self) -> Iterator[Batch]:
        """Yield the batches of all processes, from the first one on."""
        return batches(self.data, self.config, self.place, self.options.data)

    def batches(self, done: int = 0) -> Iterator[Batch]:
        """Yield the batches of this process, but for so many at the beginning."""
        # What was read to know the data is not read again the first time.
        every, self._begun = self._begun or self.everything(), None
        return itertools.islice(every, self.rank + done * self.world, None, self.world)

    def require_batches(self) -> None:
        """Raise NoBatchError in every process where one of them has no batch; every process has to call this.

        Alone one refuses, and the others, which wait for it, would be ended in the middle of their work.
        """
        if self.world == 1:
            return
        every = self._begun or self.everything()
        # Those of the processes before this one are passed over when its own are read: nothing of them is kept.
        others = [Batch() for _ in itertools.islice(every, self.rank)]
        own = list(itertools.islice(every, 1))
        self._begun = itertools.chain(others, own, every)
        lacking = torch.tensor(float(not own))
        add_up([lacking])
        if lacking:
            raise NoBatchError(
                f"the data '{self.data}' give {int(lacking)} of {self.world} processes no batch: give more data, "
                "smaller batches or fewer processes"
            )

    def record(
        self,
        sites: Mapping[str, Mapping[str, torch.Tensor]],
        layers: Mapping[str, torch.Tensor],
        aliases: Mapping[str, str],
        feeds: Mapping[str, str],
    ) -> Record:
        """Return where scores come from that are made of these sums of the sites and of the layers."""
        # Experts see what is routed to them; everything else sees equally many.
        samples = max((int(found[COUNT][1]) for found in sites.values() if "second" in found), default=0)
        data = self.options.data
        return Record(
            model_sha256=self._model_sha256, model_type=self.config.architecture.model_type,
            source=self.tensors.location, data=self.data, data_sha256=self._data_sha256, column=data.column,
            tokenizer=self.tokenizer, tokens=int(layers[COUNT][1 if self.images else 0]),
            sequence_length=0 if self.images else data.sequence_length, batch_size=data.batch_size,
            second_moments=self.options.second_moments, samples=samples, aliases=dict(aliases), feeds=dict(feeds),
        )  # fmt: skip
