"""Write a report: the page and its figures, each of them whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from anysize.errors import OutputError
from anysize.io.whole import told_of_disk, write_whole
from anysize.report.page import render
from anysize.report.plots import draw
from anysize.report.schema import Results

PAGE, FIGURES = "report.html", "figures"


@dataclass(frozen=True)
class Written:
    """What a report is made of, on disk."""

    page: Path
    figures: tuple[Path, ...]


def _refuse(folder: Path) -> None:
    for place in (folder, folder / FIGURES):
        if place.exists() and not place.is_dir():
            raise OutputError(f"the report cannot be written to '{folder}': '{place}' is not a folder")
    page = folder / PAGE
    if page.is_dir():
        raise OutputError(f"the report cannot be written to '{folder}': '{page}' is a folder, not a file")


def write_report(results: Results, folder: Path) -> Written:
    """Write report.html and figures/*.png, *.svg of these results into a folder, replacing an older report there.

    Everything is made before anything is written, and each file appears whole. Raises OutputError where the folder
    cannot be written; then the files of this report that were not there yet are not there.
    """
    _refuse(folder)
    figures = draw(results)
    page = render(results, pictures={name: data for name, data in figures.items() if name.endswith(".svg")})
    contents = {folder / FIGURES / name: data for name, data in figures.items()}
    contents[folder / PAGE] = page.encode("utf-8", errors="replace")
    made = [place for place in (folder / FIGURES, folder) if not place.exists()]
    with told_of_disk(f"cannot write the report to '{folder}'"):
        try:
            (folder / FIGURES).mkdir(parents=True, exist_ok=True)
            write_whole(contents)
        except OSError:
            for place in made:
                if place.is_dir() and not any(place.iterdir()):
                    place.rmdir()
            raise
    return Written(folder / PAGE, tuple(folder / FIGURES / name for name in figures))
