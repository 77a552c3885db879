"""How many samples second moments need for what is solved with them: who has too few is refused, who has few is told.

A fit to *m* kept coordinates has *m* unknowns for every output and one equation for every sample: up to *m* samples it
is perfect on them, and worst elsewhere just there. Removals cost nothing until no more coordinates are left than there
were samples, so that those of fewer choose by the ridge alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from anysize.config import SourceConfig
from anysize.errors import InputError
from anysize.shrink import BY_REMOVAL, FITTED, ShrinkPreset

if TYPE_CHECKING:
    from anysize.calibration.scores import Record, Scores

_HEADS = ("kv", "group", "head")
# From so many samples a kept coordinate on, readers that are fitted do better than those that are not.
_ENOUGH = 4


@dataclass(frozen=True)
class _Solved:
    """One system that is solved: the coordinates of an axis in the source, those that stay, and what is found."""

    axis: str
    size: int
    kept: int
    fitted: bool


def _solved(config: SourceConfig, target: SourceConfig, preset: ShrinkPreset, *, turned: bool) -> list[_Solved]:
    before, after = config.sizes, target.sizes
    heads = prod(before[a] for a in _HEADS)
    found: list[_Solved] = []
    if preset.readers in FITTED:
        if turned or after["hidden"] < before["hidden"]:
            found.append(_Solved("hidden", before["hidden"], after["hidden"], fitted=True))
        if after["ffn"] < before["ffn"]:
            found.append(_Solved("ffn", before["ffn"], after["ffn"], fitted=True))
        if any(after[a] < before[a] for a in _HEADS):
            found.append(_Solved("heads", heads, prod(after[a] for a in _HEADS), fitted=True))
    if preset.select in BY_REMOVAL:
        if after["ffn"] < before["ffn"]:
            found.append(_Solved("ffn", before["ffn"], after["ffn"], fitted=False))
        # kv heads are chosen with all query heads there are, and these with all kv heads.
        found += [
            _Solved("heads", heads, heads // before[axis] * after[axis], fitted=False)
            for axis in ("kv", "group")
            if after[axis] < before[axis]
        ]
    return found


def _tokens(record: Record, samples: int) -> str:
    """Return the option that makes so many samples: tokens in whole sequences (or images)."""
    tokens, whole = -(-record.tokens * samples // max(1, record.samples)), record.sequence_length or 1
    return f"--tokens {-(-tokens // whole) * whole}"


def require_samples(
    scores: Scores, config: SourceConfig, target: SourceConfig, preset: ShrinkPreset, *, turned: bool = False
) -> None:
    """Refuse second moments of no more samples than coordinates are kept, where these are fitted or chosen by them.

    turned: the stream is turned though all of it is kept. Raises InputError with the number of tokens that is needed.
    """
    record = scores.record
    solved = _solved(config, target, preset, turned=turned)
    # Scores without second moments are refused where one is asked for, with the reason.
    if not solved or not record.second_moments:
        return
    most = max(solved, key=lambda one: one.kept)
    if record.samples <= most.kept:
        kept = f"the {most.kept:,} kept coordinates of {most.axis}"
        what = f"fit what reads {kept}" if most.fitted else f"choose {kept} by what removing the others costs"
        raise InputError(
            f"the scores hold {record.samples:,} samples of each activation, too few to {what}: calibrate with "
            f"{_tokens(record, most.kept + 1)} at the very least, better ten times as many"
        )


def few_samples(scores: Scores, config: SourceConfig, target: SourceConfig, preset: ShrinkPreset) -> list[str]:
    """Return a note where second moments are of so few samples that what is chosen or fitted follows these closely."""
    record = scores.record

    def enough(one: _Solved) -> int:
        return max(one.size, _ENOUGH * one.kept if one.fitted else 0)

    solved = _solved(config, target, preset, turned=False)
    if not solved or not record.second_moments:
        return []
    most = max(solved, key=enough)
    if record.samples >= enough(most):
        return []
    kept, samples = f"the {most.kept:,} kept coordinates of {most.axis}", f"{record.samples:,} samples"
    what = f"what reads {kept} is fitted to {samples}" if most.fitted else f"{kept} are chosen by {samples}"
    return [f"{what}, which is few: calibrate with {_tokens(record, enough(most))} or more"]
