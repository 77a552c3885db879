"""What is imported when: the package and its help cost nothing, and a plan needs no torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# typer itself imports pydantic, where it is installed, when it reads the options of a command.
HEAVY_BUT_PYDANTIC = ("torch", "transformers", "numpy", "huggingface_hub", "matplotlib", "plotly", "jinja2")
HEAVY = (*HEAVY_BUT_PYDANTIC, "pydantic")


def imported(script: str, names: tuple[str, ...]) -> set[str]:
    """Run a script in an interpreter of its own and return which of the modules it imported."""
    script += f"\nimport sys\nprint('imported', *(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    last = done.stdout.splitlines()[-1].split()
    assert last[0] == "imported"
    return set(last[1:])


def test_the_probe_sees_an_import() -> None:
    assert imported("import numpy", HEAVY) == {"numpy"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import anysize\nassert anysize.__version__", HEAVY) == set()


def test_the_help_of_every_command_imports_nothing_heavy() -> None:
    script = """
import sys
from anysize.cli.main import main
for words in (["resize"], ["plan"], ["apply"], ["train"], ["compare"], ["draft"], ["demo"], ["eval"], ["report"]):
    sys.argv = ["anysize", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
    assert imported(script, HEAVY_BUT_PYDANTIC) == set()


def test_the_help_imports_nothing_heavy() -> None:
    script = """
import sys
from anysize.cli.main import main
sys.argv = ["anysize", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    assert imported(script, HEAVY) == set()


def test_a_plan_of_a_folder_imports_neither_torch_nor_transformers(llama: Path, tmp_path: Path) -> None:
    script = f"""
import anysize
plan = anysize.plan({str(llama)!r}, scale=1.5, num_hidden_layers=3)
from pathlib import Path
Path({str(tmp_path / "plan.json")!r}).write_text(plan.to_json())
"""
    assert imported(script, ("torch", "transformers", "huggingface_hub")) == set()
    assert (tmp_path / "plan.json").is_file()


def test_planning_and_inspecting_from_the_command_line_imports_no_torch(llama: Path) -> None:
    script = f"""
import sys
from anysize.cli.main import main
for words in (["plan", {str(llama)!r}, "--hidden-size", "48"], ["inspect", {str(llama)!r}]):
    sys.argv = ["anysize", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
"""
    assert imported(script, ("torch", "transformers")) == set()
