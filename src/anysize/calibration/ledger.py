"""What sets of layers measured on batches: nothing is measured twice, and a killed search finds it again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from anysize.io.cache import MOVE_CACHE
from anysize.io.whole import told_of_disk

Candidate = tuple[int, ...]
# The sets and the number of a batch in, the KL of each set on that batch out, one by one.
Measure = Callable[[Sequence[Candidate], int], Iterable[float]]


class Ledger:
    """KL of sets of layers by batch. `tokens` says how many tokens each batch holds.

    With a `place`, every measurement is appended there as a line at once. A search with the same seed asks for the same
    things in the same order, so the lines of a killed one are all it needs to go on; a line cut off by the kill is
    measured again. Raises OutputError where the place cannot be written.
    """

    def __init__(
        self,
        measure: Measure,
        tokens: Sequence[int],
        place: Path | None = None,
        report: Callable[[int], None] = lambda _spent: None,
    ) -> None:
        self.tokens, self.spent = tuple(tokens), 0
        self._measure, self._place, self._report = measure, place, report
        self._found: dict[Candidate, dict[int, float]] = {}
        self._before = {} if place is None else _read(place)

    @property
    def candidates(self) -> int:
        """How many sets were measured."""
        return len(self._found)

    def complete(self, candidate: Candidate) -> bool:
        """Whether a set was measured on all batches."""
        return len(self._found.get(candidate, ())) == len(self.tokens)

    def fill(self, candidates: Iterable[Candidate], batches: Iterable[int]) -> None:
        """Measure sets on batches, as far as that has not been done."""
        wanted = list(dict.fromkeys(candidates))
        for batch in batches:
            missing = [c for c in wanted if batch not in self._found.get(c, ())]
            for candidate in missing:
                if (candidate, batch) in self._before:
                    self._add(candidate, batch, self._before[candidate, batch])
            new = [c for c in missing if (c, batch) not in self._before]
            for candidate, value in zip(new, self._measure(new, batch) if new else (), strict=True):
                self._keep(candidate, batch, value)
                self._add(candidate, batch, value)

    def _add(self, candidate: Candidate, batch: int, value: float) -> None:
        self._found.setdefault(candidate, {})[batch] = value
        self.spent += self.tokens[batch]
        self._report(self.spent)

    def mean(self, candidate: Candidate, batches: Iterable[int]) -> float:
        """Return the mean KL of a set over the tokens of these batches."""
        values, weights = self._found[candidate], list(batches)
        return sum(values[b] * self.tokens[b] for b in weights) / sum(self.tokens[b] for b in weights)

    def _keep(self, candidate: Candidate, batch: int, value: float) -> None:
        if self._place is None:
            return
        with told_of_disk(f"cannot keep the search's state as '{self._place}'", MOVE_CACHE):
            self._place.parent.mkdir(parents=True, exist_ok=True)
            with self._place.open("a", encoding="utf-8") as file:
                # The line break comes first, so that a line which a kill cut off swallows no other.
                file.write(f"\n{json.dumps([candidate, batch, value])}")

    def close(self) -> None:
        """Remove what was kept: the search has come to its end."""
        if self._place is not None:
            self._place.unlink(missing_ok=True)


def _read(place: Path) -> dict[tuple[Candidate, int], float]:
    """Return the measurements of a killed search; what is no whole line is left out."""
    found: dict[tuple[Candidate, int], float] = {}
    try:
        text = place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        # Nothing was kept, or it cannot be reached; writing there will say so.
        return found
    for line in text.splitlines():
        with contextlib.suppress(ValueError, TypeError):
            layers, batch, value = json.loads(line)
            found[tuple(layers), batch] = float(value)
    return found
