"""The comparison in a few lines of markdown, and where they go in the card of a model."""

from __future__ import annotations

import re
from pathlib import Path

from anysize.io.card import CARD, read_card, with_section
from anysize.io.whole import told_of_disk, write_whole
from anysize.report.curves import missing
from anysize.report.headline import headline, number
from anysize.report.schema import Results
from anysize.report.tables import NOT_REACHED, share

SECTION, PICTURE = "comparison", "anysize-comparison.png"


def _plain(text: str) -> str:
    """Return text that markdown shows as it stands: on one line, with everything that means something escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#|~!$:@])", r"\\\1", text)


def card_table(results: Results, *, picture: str = "figures/curves.png") -> str:
    """Return the headline, a table of all finished arms and the picture of the curves, as markdown.

    picture: where the picture lies, as seen from the card; empty leaves it out. Shares are of the first goal's whole
    run; seconds include calibration, conversion and teacher.
    """
    goal, metric = (results.goals[0] if results.goals else None), results.metric
    found = headline(results)
    said = [_plain(found.sentence)] + [_plain("The comparison is not complete.")] * (not results.complete)
    whose = f"{_plain(goal)}'s" if goal else ""
    columns = ["arm", "learning rate", f"{_plain(metric.unit)} before", "after training"]
    columns += [f"{what} to {whose} final {_plain(metric.name)}" for what in ("steps", "seconds")] * bool(goal)
    table = [columns, ["---"] * len(columns)]
    for row in results.rows:
        cells = [_plain(row.arm), f"{row.learning_rate:g}", number(row.before), number(row.after)]
        if goal:
            there = row.reached.get(goal)
            none = NOT_REACHED if goal in row.reached else "–"
            cells += [share(there.steps_share), share(there.seconds_share)] if there else [none] * 2
        if row.num_diverged:
            cells[0] += f" \\({row.num_diverged} diverged\\)"
        table.append(cells)
    table += [[_plain(name), *["no finished run"], *["–"] * (len(columns) - 2)] for name in missing(results)]
    counts = sorted({row.num_seeds for row in results.rows}) or [0]
    seeds = " to ".join(dict.fromkeys(map(str, (counts[0], counts[-1]))))
    note = f"Medians over {seeds} seed{'s' * (seeds != '1')}; {results.lengths} steps of {results.tokens_a_step:,} "
    note += results.counted
    if goal:
        note += f"; steps and seconds as shares of {whose} run of {results.steps_of(goal):,} steps, with calibration, "
        note += "conversion and teacher"
    note += "."
    parts = [" ".join(said), "\n".join(f"| {' | '.join(cells)} |" for cells in table), note]
    if results.notes:
        parts.append("\n".join(f"- {_plain(said)}" for said in results.notes))
    if picture:
        parts.append(f"![Held-out {_plain(metric.name)} of every arm]({picture})")
    return "\n\n".join(parts) + "\n"


def write_card(results: Results, curves: bytes, model: Path) -> Path:
    """Put the table and the picture of the curves into the card of a model, in place of those of an earlier time.

    curves: the picture as PNG, which comes to lie beside the card. A folder without a card gets one. Returns the card.
    Raises InputError where the folder holds no model, OutputError where it cannot be written.
    """
    card, text = model / CARD, read_card(model, SECTION)
    made = with_section(text, SECTION, f"## {_plain(results.title)}\n\n{card_table(results, picture=PICTURE)}")
    contents = {model / PICTURE: curves, card: made.encode()}
    with told_of_disk(f"the card of '{model}' cannot be written"):
        write_whole(contents)
    return card
