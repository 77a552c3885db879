"""The README's commands run as they stand, in order, and what it says it measured is what was measured."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from anysize.arch import families

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_the_eight_lines_run_in_order(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The demo's source stands in: same family and flags, small enough to run eight commands on.
    from tests.conftest import make_llama

    del llama
    make_llama(
        tmp_path / "demo-output" / "source", hidden_size=128, intermediate_size=344, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, vocab_size=997, tie_word_embeddings=True,
    )  # fmt: skip
    words = (f"w{3 + i * i % 991}" for i in range(6_000))
    (tmp_path / "demo-output" / "text").mkdir()
    (tmp_path / "demo-output" / "text" / "train.txt").write_text(" ".join(words))
    monkeypatch.chdir(tmp_path)
    lines = [line for block in fenced("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) == 8
    (tmp_path / "out").mkdir()
    program = str(Path(sys.executable).with_name("anysize"))
    script = "set -e\n" + "\n".join(shlex.join([program, *shlex.split(line)[1:]]) for line in lines)
    assert all(line.startswith("anysize ") for line in lines)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("all proofs passed") == 5
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"wider", "deeper", "half", "plan.json", "planned"}


def test_the_python_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import make_llama

    make_llama(tmp_path / "demo-output" / "source", hidden_size=64, num_attention_heads=4)
    monkeypatch.chdir(tmp_path)
    (block,) = fenced("python")
    scope: dict[str, object] = {}
    exec(block, scope)
    assert type(scope["model"]).__name__ == "LlamaForCausalLM"
    assert (tmp_path / "out" / "grown" / "config.json").is_file()


def test_both_set_up_commands_are_named_and_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"    make {target}\n" in README
        assert re.search(rf"^{target}: ", makefile, re.MULTILINE)


def test_measured_numbers_are_those_of_the_results_files() -> None:
    from benchmarks.publish import (
        PAGES,
        compared_section,
        exactness_section,
        examples_section,
        measured_section,
        memory_section,
        plan_section,
        replaced,
    )

    assert replaced(README, "measured", measured_section()) == README
    assert replaced(README, "plan", plan_section()) == README
    exactness = (ROOT / "docs" / "exactness.md").read_text(encoding="utf-8")
    assert replaced(exactness, "exactness", exactness_section()) == exactness
    examples = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert replaced(examples, "memory", examples_section()) == examples
    shrinking = (ROOT / "docs" / "shrinking.md").read_text(encoding="utf-8")
    assert replaced(shrinking, "memory", memory_section()) == shrinking
    assert len(PAGES) > 8
    for suite, page in PAGES.items():
        told = (ROOT / page).read_text(encoding="utf-8")
        assert replaced(told, f"compared {suite}", compared_section(suite)) == told


def test_published_steps_are_those_that_arms_take() -> None:
    from benchmarks.publish import compared_section

    assert "250 to 500 steps of 2,048 tokens, at each step the same for every arm; each" in compared_section(
        "grow-in-stages"
    )
    assert "500 steps of 2,048 tokens, the same for every arm. Rates" in compared_section("grow-recipes")


def test_every_suite_is_named_with_its_command() -> None:
    told = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    places = [place for place in ROOT.glob("benchmarks/*/*.py") if 'if __name__ == "__main__"' in place.read_text()]
    assert len(places) > 7
    assert [place.name for place in places if f"`benchmarks.{place.parent.name}.{place.stem}`" not in told] == []


def test_every_file_that_the_readme_points_at_exists() -> None:
    links = re.findall(r"\]\(((?:docs|src)/[^)#]+)\)", README)
    assert len(links) > 6
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_the_families_of_the_readme_are_those_of_the_tables() -> None:
    listed = re.search(r"^Families, by `model_type`: (.*)\.$", README, re.MULTILINE)
    assert listed is not None
    assert listed[1].split(", ") == sorted(families())
