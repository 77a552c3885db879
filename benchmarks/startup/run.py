"""What `import anysize` and `anysize --help` cost, and that neither imports torch.

python -m benchmarks.startup.run
"""

from __future__ import annotations

import subprocess
import sys

from benchmarks.measure import anysize, run, spread, write_results

_REPEATS = 15


def _walls(command: list[str]) -> list[float]:
    return [run(command).wall_s for _ in range(_REPEATS)]


def _imports_torch(code: str) -> bool:
    check = f"import sys\n{code}\nsys.exit('torch' in sys.modules)"
    return subprocess.run([sys.executable, "-c", check], check=False).returncode != 0


def main() -> None:
    """Time both beside an empty interpreter and write the results."""
    empty = _walls([sys.executable, "-c", "pass"])
    imported = _walls([sys.executable, "-c", "import anysize"])
    helped = _walls(anysize("--help"))
    results = {
        "interpreter_s": spread(empty),
        "import_anysize_s": spread([wall - min(empty) for wall in imported]),
        "import_asked_s": 0.05,
        "help_s": spread(helped),
        "help_asked_s": 0.15,
        "import_loads_torch": _imports_torch("import anysize"),
        "help_loads_torch": _imports_torch("import anysize.cli.main"),
    }
    print(results)
    print(write_results(__file__, results))


if __name__ == "__main__":
    main()
