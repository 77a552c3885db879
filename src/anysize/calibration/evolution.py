"""Which layers to drop, by evolution: sets of layers are run, and those nearest to the source have offspring.

How much a layer matters depends on which others are gone, so scores of single layers do not add up. Here whole sets
are measured, by KL(source || candidate). Source: EvoPress (2410.14649), for whole layers; it is there that a level
switch is a kept layer for a dropped one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np

from anysize import __version__
from anysize.calibration.calibrate import CalibrationOptions, loaded_source, mode_kept, running_place
from anysize.calibration.data import Batch, DataOptions, batches_again
from anysize.calibration.divergence import Divergence
from anysize.calibration.ledger import Candidate, Ledger
from anysize.config import SourceConfig, understand
from anysize.errors import SizeError
from anysize.io.cache import cache_folder
from anysize.io.whole import scratch_folder
from anysize.layers import CUT, SCORED, layer_plan
from anysize.progress import Progress
from anysize.split import stream

if TYPE_CHECKING:
    from anysize.calibration.scores import Scores
    from anysize.io.reader import TensorSource
    from anysize.recipe import Options

# The paper's: sets of the first generation, offspring of each further one, how many of them are measured again on more
# tokens, and of how many layers at most they differ from their parent.
FIRST, OFFSPRING, SURVIVORS, MOST_SWITCHES = 64, 32, 2, 3
FEW_TOKENS, MANY_TOKENS = 2_048, 32_768
# A draw that gives a set already measured is drawn again, so often at most for each offspring.
_TRIES = 100


@dataclass(frozen=True)
class Found:
    """The layers kept, their KL to the source in nats per token, of how many sets they are the best, and the KL of the
    named patterns."""

    layers: Candidate
    kl: float
    num_sets: int
    named: Mapping[str, float]

    @property
    def listed(self) -> str:
        """The layers as an explicit list."""
        return ",".join(map(str, self.layers))

    @property
    def note(self) -> str:
        """What the plan says about the search."""
        others = ", ".join(f"{name} {value:.4f}" for name, value in sorted(self.named.items(), key=lambda n: n[1]))
        return (
            f"layers evolutionary: KL {self.kl:.4f} nats from the source, the least of {self.num_sets} sets of layers "
            f"({others})"
        )


def mutated(parent: Candidate, source_size: int, rng: np.random.Generator) -> Candidate:
    """Return a parent with 1 to 3 kept layers switched for dropped ones; few are likelier than many."""
    dropped = [layer for layer in range(source_size) if layer not in parent]
    switches = min(*rng.integers(1, MOST_SWITCHES + 1, size=2).tolist(), len(parent), len(dropped))
    out = {parent[i] for i in rng.permutation(len(parent))[:switches]}
    new = {dropped[i] for i in rng.permutation(len(dropped))[:switches]}
    return tuple(sorted(set(parent) - out | new))


class Search:
    """Looks for the set of `target_size` of `source_size` layers that is nearest to the source.

    A set is measured on few batches first, other ones in every generation, and only the best of a generation on all of
    them, where its parent competes as well: the best is never lost. `named` are the sets to begin with; they are
    measured on all batches, so that what is found is no worse than any of them there.
    """

    def __init__(
        self, source_size: int, target_size: int, ledger: Ledger, named: Iterable[Candidate], *, budget: int, seed: int
    ) -> None:
        self.source_size, self.target_size = source_size, target_size
        self.ledger, self.named, self.budget, self.seed = ledger, sorted(set(named)), budget, seed
        self.every = range(len(ledger.tokens))
        self._few = min(len(ledger.tokens), -(-FEW_TOKENS // ledger.tokens[0]))

    @property
    def exhaustive_tokens(self) -> int:
        """What it takes to measure every set on all batches."""
        return comb(self.source_size, self.target_size) * sum(self.ledger.tokens)

    @property
    def total_tokens(self) -> int:
        """What will be spent at most."""
        return min(self.budget, self.exhaustive_tokens)

    def _generation_tokens(self, candidates: int, survivors: int) -> int:
        """Return what a generation takes at most: all on some batches, the survivors on the others as well."""
        windows = [sum(self.ledger.tokens[b] for b in self._window(g)) for g in self.every]
        return candidates * max(windows) + survivors * (sum(self.ledger.tokens) - min(windows))

    def require_budget(self) -> None:
        """Raise SizeError where the budget does not reach for the first generation and one of offspring."""
        first = self._generation_tokens(FIRST, len(self.named) + SURVIVORS)
        needed = min(self.exhaustive_tokens, first + self._generation_tokens(OFFSPRING, SURVIVORS))
        if self.budget < needed:
            raise SizeError(
                f"search_tokens={self.budget}: to search for {self.target_size} of {self.source_size} layers takes at "
                f"least {needed} tokens on these data, one generation of offspring included"
            )

    def run(self) -> Candidate:
        """Return the best set found; the same seed, budget and data give the same."""
        if self.exhaustive_tokens <= self.budget:
            return self._nearest(itertools.combinations(range(self.source_size), self.target_size), self.every, 1)[0]
        window = self._window(0)
        best = self._nearest([*self.named, *self._nearest(self._first(), window, SURVIVORS)], self.every, 1)[0]
        for generation in itertools.count(1):
            if self.ledger.spent + self._generation_tokens(OFFSPRING, SURVIVORS) > self.budget:
                return best
            offspring = self._offspring(best, stream(self.seed, "layers", generation))
            if not offspring:
                return best
            survivors = self._nearest(offspring, self._window(generation), SURVIVORS)
            best = self._nearest([best, *survivors], self.every, 1)[0]
        raise AssertionError  # pragma: no cover - generations do not end

    def _window(self, generation: int) -> list[int]:
        """Return the batches on which a generation is measured first."""
        count = len(self.every)
        return [(generation * self._few + i) % count for i in range(self._few)]

    def _nearest(self, candidates: Iterable[Candidate], batches: Sequence[int], count: int) -> list[Candidate]:
        """Return the sets with the least KL on these batches, the nearest first; of equal ones the lowest layers."""
        found = sorted(set(candidates))
        self.ledger.fill(found, batches)
        return sorted(found, key=lambda candidate: self.ledger.mean(candidate, batches))[:count]

    def _first(self) -> list[Candidate]:
        """Return the first generation: the named sets and random ones."""
        rng = stream(self.seed, "layers", 0)
        found = dict.fromkeys(self.named[:FIRST])
        for _ in range(_TRIES * FIRST):
            if len(found) == FIRST:
                break
            found[tuple(sorted(rng.permutation(self.source_size)[: self.target_size].tolist()))] = None
        return list(found)

    def _offspring(self, parent: Candidate, rng: np.random.Generator) -> list[Candidate]:
        """Return sets near a parent that were not measured on everything yet."""
        found: dict[Candidate, None] = {}
        for _ in range(_TRIES * OFFSPRING):
            if len(found) == OFFSPRING:
                break
            child = mutated(parent, self.source_size, rng)
            if not self.ledger.complete(child):
                found[child] = None
        return list(found)


def _tokens(batch: Batch, config: SourceConfig) -> int:
    """Return the tokens of a batch; an image has as many as it has patches."""
    if config.architecture.modality == "text":
        return batch["input_ids"].numel()
    return len(batch["pixel_values"]) * (config.full["image_size"] // config.full["patch_size"]) ** 2


def _batches(tensors: TensorSource, config: SourceConfig, scores: Scores) -> list[Batch]:
    """Return the first batches of the data that the scores were made of, `MANY_TOKENS` of them as far as they go."""
    found: list[Batch] = []
    for batch in batches_again(scores.record, config, tensors, limit=MANY_TOKENS):
        found.append(batch)
        if sum(_tokens(b, config) for b in found) >= MANY_TOKENS:
            break
    return found


def _named(source_size: int, target_size: int, scores: Scores) -> dict[str, Candidate]:
    """Return what the patterns keep that need nothing, or scores that there are."""
    kinds: dict[str, Any] = {kind: values.tolist() for kind, values in scores.blocks.items()}
    patterns = [*CUT, *(pattern for pattern, kind in SCORED.items() if kind in kinds)]
    return {
        pattern: tuple(step.source for step in layer_plan(source_size, target_size, pattern, kinds))
        for pattern in patterns
    }


def _fingerprint(scores: Scores, batches: Sequence[Batch], told: Sequence[object]) -> str:
    """Return what tells one search from another: the model, the data themselves, and everything asked for."""
    digest = hashlib.sha256(json.dumps([__version__, scores.record.model_sha256, *told]).encode())
    for batch in batches:
        for name, values in batch.items():
            digest.update(f"{name}{tuple(values.shape)}".encode())
            digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()[:32]


def searched(
    tensors: TensorSource,
    target_size: int,
    scores: Scores,
    options: Options,
    progress: Progress,
    *,
    low_memory: bool = False,
) -> Found:
    """Return the layers of a source that together come nearest to it, within `options.search_tokens` tokens.

    The data are those of the scores. What was measured is kept in the cache folder until the search ends, so that a
    killed one goes on. Raises SizeError for a budget too small, InputError where the data are gone.
    """
    config = understand(tensors.config)
    source_size, budget = config.sizes["layer"], options.search_tokens
    named = _named(source_size, target_size, scores)
    batches = _batches(tensors, config, scores)
    data = DataOptions(sequence_length=scores.record.sequence_length, batch_size=scores.record.batch_size)
    how = CalibrationOptions(data, low_memory=low_memory)
    device, low = running_place(tensors, how, logits=True)
    told = [source_size, target_size, options.seed, budget, str(device), sorted(named.values())]
    with scratch_folder() as scratch, mode_kept(tensors):
        divergence = Divergence(lambda: loaded_source(tensors, scratch, device, low=low), config, batches)
        place = cache_folder() / "search" / f"{_fingerprint(scores, batches, told)}.jsonl"
        counts = [_tokens(batch, config) for batch in batches]
        ledger = Ledger(divergence.of, counts, place, lambda spent: progress("search", spent, search.total_tokens))
        search = Search(source_size, target_size, ledger, named.values(), budget=budget, seed=options.seed)
        search.require_budget()
        best = search.run()
    ledger.close()
    values = {pattern: ledger.mean(layers, search.every) for pattern, layers in named.items()}
    return Found(best, ledger.mean(best, search.every), ledger.candidates, values)
