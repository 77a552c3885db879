"""Parse the one-line arrows that say which axes a parameter reads and writes. No torch, no sizes.

    norm(hidden) -> (kv group head)                   a linear layer: left is read, right is written
    vocab -> hidden, stored in x out                  an embedding: its rows are what it reads
    -> ffn                                            a bias: it only writes
    norm(hidden) -> (kv group head) + (kv head)       blocks side by side in one tensor dim

Grammar: blanks separate tensor dims, parentheses compose axes into one dim (outermost first), `+` concatenates
blocks within one dim, integers are fixed sizes. A *role* around an axis says what acts on it:
`norm(hidden)` is the residual stream after a normalization, `query(head)` and `key(head)` meet in a dot product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from anysize.errors import ArchitectureError, did_you_mean

ROLES = frozenset({"norm", "query", "key"})
TRANSPOSED = "stored in x out"
_TOKEN = re.compile(r"\s*(?:[A-Za-z_]+\(?|\d+|[()+])")


@dataclass(frozen=True)
class Factor:
    """One axis of a composed dim: a name (or a fixed integer size) and the role it plays there."""

    axis: str
    role: str = ""

    @property
    def fixed(self) -> int | None:
        return int(self.axis) if self.axis.isdigit() else None

    def __str__(self) -> str:
        return f"{self.role}({self.axis})" if self.role else self.axis


@dataclass(frozen=True)
class Block:
    """Axes composed into one range of a dim, outermost first."""

    factors: tuple[Factor, ...]

    def __str__(self) -> str:
        text = " ".join(map(str, self.factors))
        return f"({text})" if len(self.factors) > 1 else text


@dataclass(frozen=True)
class Dim:
    """One dim of a stored tensor: blocks side by side."""

    blocks: tuple[Block, ...]

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(f.axis for block in self.blocks for f in block.factors if f.fixed is None)

    def __str__(self) -> str:
        return " + ".join(map(str, self.blocks))


@dataclass(frozen=True)
class Arrow:
    """What a parameter reads (left), what it writes (right), and which of the two is stored first."""

    reads: tuple[Dim, ...]
    writes: tuple[Dim, ...]
    reads_first: bool = False

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The dims in storage order."""
        return self.reads + self.writes if self.reads_first else self.writes + self.reads

    @property
    def axes(self) -> frozenset[str]:
        return frozenset(axis for dim in self.dims for axis in dim.axes)

    def __str__(self) -> str:
        left, right = (" ".join(map(str, side)) for side in (self.reads, self.writes))
        return f"{left} -> {right}".strip() + (f", {TRANSPOSED}" if self.reads_first else "")


def _refuse(text: str, why: str) -> ArchitectureError:
    return ArchitectureError(f"cannot parse the arrow '{text}': {why}")


def _tokens(side: str, text: str) -> list[str]:
    found: list[str] = []
    position = 0
    stripped = side.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise _refuse(text, f"unexpected '{stripped[position:].strip()[0]}'")
        found.append(match.group().strip())
        position = match.end()
    return found


class _Side:
    """Recursive descent over the tokens of one side of an arrow."""

    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens, self.text, self.at = tokens, text, 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.peek()
        if not token or (wanted and token != wanted):
            raise _refuse(self.text, f"wanted '{wanted or 'an axis'}', got '{token or 'the end'}'")
        self.at += 1
        return token

    def axis(self, name: str) -> str:
        if name in ("(", ")", "+") or name in ROLES or name.endswith("("):
            raise _refuse(self.text, f"wanted an axis, got '{name}'")
        return name

    def factor(self) -> Factor:
        name = self.take()
        role, touching, _ = name.partition("(")
        if not role or not touching:
            return Factor(self.axis(name))
        if role not in ROLES:
            raise _refuse(self.text, f"unknown role '{role}'{did_you_mean(role, ROLES)}")
        factor = Factor(self.axis(self.take()), role)
        self.take(")")
        return factor

    def block(self) -> Block:
        if self.peek() != "(":
            return Block((self.factor(),))
        self.take("(")
        factors = [self.factor()]
        while self.peek() != ")":
            factors.append(self.factor())
        self.take(")")
        return Block(tuple(factors))

    def dims(self) -> tuple[Dim, ...]:
        dims: list[Dim] = []
        while self.peek():
            blocks = [self.block()]
            while self.peek() == "+":
                self.take("+")
                blocks.append(self.block())
            dims.append(Dim(tuple(blocks)))
        return tuple(dims)


@cache
def parse(text: str) -> Arrow:
    """Return the arrow that `text` spells; raise ArchitectureError naming the character that does not fit."""
    body, comma, storage = text.partition(",")
    if comma and storage.strip() != TRANSPOSED:
        raise _refuse(text, f"after the comma only '{TRANSPOSED}' is known, got '{storage.strip()}'")
    left, arrow, right = body.partition("->")
    if not arrow:
        raise _refuse(text, "there is no '->'")
    reads, writes = (_Side(_tokens(side, text), text).dims() for side in (left, right))
    if not writes:
        raise _refuse(text, "nothing is written: the right side is empty")
    return Arrow(reads, writes, bool(comma))
