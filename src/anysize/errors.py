"""Every way anysize says no, named by who must act."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AnysizeError(Exception):
    """Base of all errors that anysize raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(AnysizeError):
    """The user's input cannot be used: what failed, on what, got, wanted, why and the fix in one sentence."""


class CheckpointError(InputError):
    """A checkpoint on disk is missing, malformed, unsafe, or not what its config says."""


class ArchitectureError(InputError):
    """The model family, or a setting of its config, is not understood well enough to be resized safely."""


class SizeError(InputError):
    """A requested size is illegal for the family, or cannot be reached by the chosen preset."""


class OutputError(InputError):
    """The output cannot be written: not empty, not writable, or the disk is full."""


class ProofError(AnysizeError):
    """A proof failed: the result is not what the plan promises. Nothing was left behind unless said otherwise."""

    exit_code = 1


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def joined(problems: Iterable[str]) -> str:
    """Join all problems of one kind into one message, so that the user mends them in one go."""
    return "; ".join(problems)
