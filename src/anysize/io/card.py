"""Model cards that several commands write into: each its own marked section, which it alone replaces."""

from __future__ import annotations

import re
from pathlib import Path

from anysize.errors import InputError, joined

CARD = "README.md"


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- begin {name} -->", f"<!-- end {name} -->"


def read_card(model: Path, name: str) -> str:
    """Return the card of a model, or the beginning of one.

    Raises InputError where a folder holds no model, or a card that is no text or has one mark of the section `name`
    without the other.
    """
    if not (model / "config.json").is_file():
        raise InputError(f"'{model}' holds no model: there is no config.json in it, so it has no card")
    card = model / CARD
    try:
        text = card.read_text(encoding="utf-8") if card.is_file() else f"# {model.resolve().name}\n"
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the card '{card}' cannot be read: {error}") from error
    found = re.findall("|".join(_marks(name)), text)
    if found not in ([], [*_marks(name)]):
        raise InputError(f"the card '{card}' has {joined(found)}, and not one pair of them: mend or remove them")
    return text


def with_section(text: str, name: str, body: str) -> str:
    """Return a card with a section in place of that of an earlier time, or at its end."""
    begin, end = _marks(name)
    section = f"{begin}\n{body}{end}\n"
    known = re.compile(rf"{begin}.*?{end}\n?", re.DOTALL)
    return known.sub(lambda _: section, text) if known.search(text) else f"{text.rstrip()}\n\n{section}"
