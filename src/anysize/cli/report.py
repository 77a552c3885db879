"""`anysize report`: a comparison as one page, figures and a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from anysize.cli import options as o


def report(
    results: Annotated[Path, typer.Argument(help="A results.json of a comparison, or a folder with one.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="The folder to write to; beside RESULTS if not given.")
    ] = None,
    card: Annotated[
        Path | None, typer.Option("--card", help="A model's folder, whose card gets the table and the picture.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Write RESULTS as one HTML page that needs no network, with its figures, and print the summary."""
    from json import dumps  # noqa: PLC0415

    from anysize.cli.show import print_table, say  # noqa: PLC0415
    from anysize.io.card import read_card  # noqa: PLC0415
    from anysize.report.card import SECTION, write_card  # noqa: PLC0415
    from anysize.report.headline import headline  # noqa: PLC0415
    from anysize.report.schema import Results  # noqa: PLC0415
    from anysize.report.tables import lines, summary  # noqa: PLC0415
    from anysize.report.write import write_report  # noqa: PLC0415

    found = Results.load(results)
    if card is not None:
        read_card(card, SECTION)  # refused before anything is written
    written = write_report(found, output or (results if results.is_dir() else results.parent))
    if card is not None:
        curves = next(figure for figure in written.figures if figure.name == "curves.png")
        write_card(found, curves.read_bytes(), card)
    said = headline(found)
    if json:
        told = {
            "headline": said.sentence,
            "beside": said.beside,
            "complete": found.complete,
            "notes": found.notes,
            "rows": [row.model_dump(mode="json") for row in found.rows],
            "page": str(written.page),
            "figures": [str(figure) for figure in written.figures],
            "card": str(card / "README.md") if card else "",
        }
        print(dumps(told))
        return
    headings, rows = lines(summary(found))
    print_table(found.title, headings, rows)
    if found.goals:
        say(f"columns 'to ...': shares of that arm's whole run, until its final {found.metric.name}")
        say("seconds and FLOPs include calibration, conversion and the teacher")
    say(said.sentence)
    for line in said.beside:
        say(line)
    for note in found.notes:
        say(f"note: {note}")
    if not found.complete:
        say("not complete: runs are missing, and what is here may change")
    if card is not None:
        say(f"wrote the table and the picture into the card of {card}")
    say(f"made {written.page} and {len(written.figures)} figures in {written.page.parent / 'figures'}")
