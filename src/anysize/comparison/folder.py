"""The folder of a comparison: what is kept between calls, so that a stopped comparison goes on where it was.

comparison.json          what all runs share; another comparison may not use the folder
target.json              the config that all arms have
scores/, starts/         calibrations and converted models, by what they depend on
runs/<key>/run.json      what one run measured; until then, the checkpoints it may save
results.json             everything so far, written after every run
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anysize import __version__
from anysize.comparison.config import CompareConfig
from anysize.errors import InputError
from anysize.io.data_identity import data_identity, same_data
from anysize.io.whole import read_json, write_json

RECORD = "comparison.json"


def key_of(*parts: Any) -> str:
    """Return a short name for everything that something depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Place:
    """The folder of one comparison.

    identity: of everything that its runs share, source, target, data, training. identities: of the weights of models
    that some arms have for themselves, sources and teachers, by their names.
    """

    path: Path
    identity: str
    identities: Mapping[str, str]

    def _key(self, models: Iterable[str], *parts: Any) -> str:
        return key_of(self.identity, *parts, *(self.identities[model] for model in models if model in self.identities))

    def withdraw(self) -> None:
        """Remove the folder of a comparison that could not begin; one in which work was done stays."""
        if not any((self.path / made).exists() for made in ("runs", "starts", "scores")):
            shutil.rmtree(self.path, ignore_errors=True)

    @property
    def target(self) -> Path:
        """Where the config of the target lies."""
        return self.path / "target.json"

    def scores(self, config: CompareConfig, arm: str) -> Path:
        """Return where the scores that an arm is made by lie; arms of one source that ask for the same share them."""
        from anysize.calibration.scores import FORMAT  # noqa: PLC0415

        source = config.resize_of(arm, 0).source
        key = self._key([source], source, config.leaves_one_out(arm), FORMAT)
        return self.path / "scores" / f"{key}.safetensors"

    def start(self, config: CompareConfig, arm: str, seed: int) -> Path:
        """Return where the model that an arm starts from lies."""
        resize = config.resize_of(arm, seed)
        # Another version may make another start of the same resize.
        return self.path / "starts" / self._key([resize.source], resize.model_dump(mode="json"), __version__)

    def run(self, config: CompareConfig, arm: str, rate: float, seed: int, steps: int) -> Path:
        """Return the folder of one run: two arms that differ in nothing but their names share it."""
        asked = config.arms[arm].model_dump(mode="json", exclude={"learning_rates", "source_cost"})
        models = config.models_of(arm)
        return self.path / "runs" / self._key(models, asked, config.evaluations, rate, seed, steps, __version__)


def claimed(
    config: CompareConfig, source_identity: str, identities: Mapping[str, str], sizes: Mapping[str, int], seconds: str
) -> Place:
    """Return the folder of a comparison, which is locked already; raise InputError where it holds another one.

    sizes: of the target, which may be those of another model. seconds: whose they are, which cannot be mixed; they are
    no part of what runs are known by.
    Arms, rates and seeds may be added to a comparison; source, target, data and shared training may not change.
    """
    path = Path(config.output).expanduser()
    data = config.data
    named = (data.train, data.validation, data.test, data.tokenizer, config.calibration.data)
    files = [name for name in named if name]
    shared = {
        "source": source_identity, "target": config.target.model_dump(mode="json"), "sizes": dict(sizes),
        "data": data.model_dump(mode="json"), "training": config.training,
        "calibration": config.calibration.model_dump(mode="json"),
        "files": [data_identity(name) for name in files],
    }  # fmt: skip
    shared: dict[str, Any] = json.loads(json.dumps(shared))
    record = path / RECORD
    if record.is_file():
        known = read_json(record, fix="choose another output, or put back the file as it was")
        if (timed := known.pop("seconds", seconds)) != seconds:
            raise InputError(
                f"the output '{path}' holds runs that were timed by seconds {timed}, and here they are {seconds}: they "
                "cannot be compared; choose another one, or set training.use_cpu"
            )
        before = known.get("files", [])
        if len(before) == len(files) and all(map(same_data, before, shared["files"])):
            shared["files"] = before
        if known != shared:
            changed = ", ".join(sorted(name for name in shared if known.get(name) != shared[name]))
            raise InputError(
                f"the output '{path}' holds another comparison ({changed} differ): choose another one; nothing of it "
                "was changed"
            )
    else:
        write_json(record, {**shared, "seconds": seconds})
    return Place(path, key_of(shared), identities)
