"""Every suite of the benchmarks can be run as it stands, whole and in short."""

from __future__ import annotations

import pytest
from benchmarks.train.run import HERE, SUITES, in_short

from anysize.comparison.config import compare_config
from anysize.training.config_file import read_yaml

SHORT = 4


def test_every_config_beside_the_script_is_a_suite() -> None:
    assert {path.stem for path in HERE.glob("*.yaml")} == set(SUITES)


@pytest.mark.parametrize("name", sorted(SUITES))
def test_a_suite_in_short_has_a_part_of_every_count_of_steps(name: str) -> None:
    raw = read_yaml(HERE / f"{name}.yaml")
    whole, short = compare_config(raw, name), compare_config(in_short(raw), name)
    assert short.seeds == (0,)
    assert len(short.learning_rates) <= 2
    assert list(short.arms) == list(whole.arms)
    for arm, asked in whole.arms.items():
        less = short.arms[arm]
        assert less.distill == asked.distill or less.distill is not None
        for steps in ("until_step", "fade_steps"):
            before = getattr(asked.distill, steps, None)
            # A number below 1 is a share of the steps, and stays.
            after = before // SHORT if isinstance(before, int) else before
            assert getattr(less.distill, steps, None) == after
        assert less.training.get("max_steps") == (asked.training.get("max_steps", 0) // SHORT or None)
        for suite, given in ((whole, asked), (short, less)):
            if given.distill is not None:
                given.distill.require_room(given.training.get("max_steps") or suite.training["max_steps"])
