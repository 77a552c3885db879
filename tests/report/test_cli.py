"""`anysize report`: what it writes, what it says, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from anysize.errors import OutputError
from anysize.report import write
from anysize.report.write import write_report
from tests.report.samples import looking_real, small

Run = Callable[..., Any]
FIGURES = sorted(f"{name}.{kind}" for name in ("curves", "kept", "rates") for kind in ("png", "svg"))


def drawn_at_once(_: object) -> dict[str, bytes]:
    return dict.fromkeys(FIGURES, b"<svg/>")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    small("random", "ours", "worse", after={"worse": 9.0}).save(tmp_path / "results.json")
    return tmp_path / "results.json"


def test_a_report_is_written_beside_its_results(cli: Run, results: Path) -> None:
    ran = cli("report", results)
    assert (ran.code, ran.err) == (0, "")
    folder = results.parent
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "report.html", "results.json"]
    assert sorted(path.name for path in (folder / "figures").iterdir()) == FIGURES
    lines = ran.out.splitlines()
    assert lines[0] == "small"
    assert lines[1].split()[:4] == ["arm", "rate", "before", "after"]
    assert [line.split()[0] for line in lines[2:5]] == ["random", "ours", "worse"]
    assert lines[4].count("not reached") == 3
    assert "seconds and FLOPs include calibration, conversion and the teacher" in lines
    assert "Seconds and FLOPs include calibration, conversion and the teacher; " in (folder / "report.html").read_text()
    assert "ours reaches the final loss of random in 1/9 of its steps." in lines
    assert lines[-1].startswith(f"made {folder / 'report.html'} and 6 figures")


def test_json_tells_the_same(cli: Run, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "draw", drawn_at_once)
    ran = cli("report", results.parent, "-o", tmp_path / "a" / "b", "--json")
    told = json.loads(ran.out)
    assert told["headline"] == "ours reaches the final loss of random in 1/9 of its steps."
    assert [row["arm"] for row in told["rows"]] == ["random", "ours", "worse"]
    assert told["complete"] is True
    assert Path(told["page"]) == tmp_path / "a" / "b" / "report.html"
    assert all(Path(figure).is_file() for figure in told["figures"])
    assert sorted(path.name for path in results.parent.iterdir()) == ["a", "results.json"]


def test_an_incomplete_comparison_is_reported_as_such(
    cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "draw", drawn_at_once)
    small(rows=small().rows[:1], complete=False, notes=("the best may lie beyond",)).save(tmp_path / "results.json")
    ran = cli("report", tmp_path)
    assert ran.code == 0
    assert "no finished run" in ran.out
    assert "note: the best may lie beyond" in ran.out
    assert "not complete: runs are missing" in ran.out


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": 1}', "[1, 2]", "\ud7ff{"])
def test_bad_input_is_one_sentence_and_leaves_nothing(cli: Run, tmp_path: Path, content: str | None) -> None:
    place = tmp_path / "results.json"
    if content is not None:
        place.write_text(content)
    ran = cli("report", place, "-o", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.startswith("anysize: ")
    assert len(ran.err.splitlines()) == 1
    assert "results.json" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == (["results.json"] if content is not None else [])


def test_a_place_that_cannot_be_written_is_refused(cli: Run, results: Path) -> None:
    ran = cli("report", results, "-o", results)
    assert (ran.code, ran.err.splitlines()[0].endswith("is not a folder")) == (2, True)
    (results.parent / "report.html").mkdir()
    ran = cli("report", results)
    assert (ran.code, "is a folder, not a file" in ran.err) == (2, True)
    assert sorted(path.name for path in results.parent.iterdir()) == ["report.html", "results.json"]


def test_a_full_disk_leaves_the_old_report_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "draw", drawn_at_once)
    write_report(looking_real(), tmp_path / "old")
    old = (tmp_path / "old" / "report.html").read_bytes()
    whole = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.name.startswith(".report.html"):
            whole(self, data[:100])
            raise OSError(28, "No space left on device")
        return whole(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    for name in ("old", "new"):
        with pytest.raises(OutputError, match="No space left on device"):
            write_report(small(), tmp_path / name)
    assert (tmp_path / "old" / "report.html").read_bytes() == old
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "new").exists()


def test_a_report_needs_neither_torch_nor_a_graphical_backend(results: Path) -> None:
    script = f"""
import sys
from anysize.cli.main import main
sys.argv = ["anysize", "report", {str(results)!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("imported", *(n for n in ("torch", "transformers", "matplotlib.pyplot", "matplotlib") if n in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported matplotlib"


def test_a_model_gets_the_table_and_the_picture(
    cli: Run, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "draw", drawn_at_once)
    model = tmp_path / "model"
    model.mkdir()
    ran = cli("report", results, "--card", model)
    assert ran.code == 2
    assert "holds no model" in ran.err
    assert not list(model.iterdir())
    assert not (results.parent / "report.html").exists()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("---\ntags: [mine]\n---\n\n# Mine\n\nKept.\n")
    for _ in range(2):
        ran = cli("report", results, "--card", model)
        assert ran.code == 0, ran.err
    text = (model / "README.md").read_text()
    assert text.startswith("---\ntags: [mine]\n---\n\n# Mine\n\nKept.\n\n<!-- begin comparison -->")
    assert text.count("ours reaches the final loss of random in 1/9 of its steps.") == 1
    assert "](anysize-comparison.png)" in text
    assert (model / "anysize-comparison.png").read_bytes() == drawn_at_once(None)["curves.png"]
    broken = text.replace("<!-- end comparison -->", "") + "\n## License\n"
    (model / "README.md").write_text(broken)
    ran = cli("report", results, "--card", model)
    assert ran.code == 2
    assert "and not one pair of them" in ran.err
    assert (model / "README.md").read_text() == broken
