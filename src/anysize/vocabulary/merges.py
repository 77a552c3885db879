"""Byte-pair merges: which tokens stand between the characters of a token and the token itself."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

Merge = tuple[str, str]


class Merges:
    """The merges of a BPE model, best first, with what it adds to characters inside or at the end of a word.

    The characters of a token merge in the same order wherever the token ends up in a text, because no merge ever
    crosses its borders. So the tokens on its way are those that come up when it is merged alone.
    """

    def __init__(self, merges: Sequence[Merge], *, prefix: str = "", suffix: str = "") -> None:
        self.prefix, self.suffix = prefix, suffix
        self._rank: dict[Merge, int] = {}
        for rank, merge in enumerate(merges):
            self._rank.setdefault(merge, rank)

    def merged(self, merge: Merge) -> str:
        """Return the token that a merge makes."""
        return merge[0] + merge[1].removeprefix(self.prefix)

    def _characters(self, token: str) -> list[str]:
        inner = bool(self.prefix) and token.startswith(self.prefix)
        ended = bool(self.suffix) and token.endswith(self.suffix)
        text = token.removeprefix(self.prefix) if inner else token
        found = list(text.removesuffix(self.suffix) if ended else text)
        found = [char if i == 0 and not inner else self.prefix + char for i, char in enumerate(found)]
        return [*found[:-1], found[-1] + self.suffix] if ended and found else found

    def parts(self, token: str) -> set[str]:
        """Return every token that comes up while the characters of a token are merged, the last ones included."""
        pieces = self._characters(token)
        seen = set(pieces)
        while len(pieces) > 1:
            ranked = [(self._rank[pair], i) for i, pair in enumerate(itertools.pairwise(pieces))
                      if pair in self._rank]  # fmt: skip
            if not ranked:
                break
            _, at = min(ranked)
            pieces[at : at + 2] = [self.merged((pieces[at], pieces[at + 1]))]
            seen.add(pieces[at])
        return seen

    def among(self, kept: Mapping[str, int] | set[str]) -> Iterable[Merge]:
        """Yield the merges, best first, whose two parts and result are all kept."""
        return (m for m in self._rank if m[0] in kept and m[1] in kept and self.merged(m) in kept)
