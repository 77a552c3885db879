"""Tables compute over config keys and cannot do anything else."""

from __future__ import annotations

import pytest

from anysize.arch.expression import evaluate, names
from anysize.errors import ArchitectureError

CONFIG = {"a": 7, "b": None, "flag": True, "n": 3}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a", 7),
        ("b or 4 * a", 28),
        ("a // n", 2),
        ("a % n == 1", True),
        ("(a // n) ** 2 + 1", 5),
        ("not flag", False),
        ("flag and a != n", True),
        ("a - n < 4 or a <= 3", False),
        ("True", True),
    ],
)
def test_expressions_are_arithmetic_over_keys(text: str, value: object) -> None:
    assert evaluate(text, CONFIG) == value


@pytest.mark.parametrize(
    "text", ["a.real", "a[0]", "print(a)", "[a]", "lambda: a", "a if flag else n", "a < n < 3", "-a"]
)
def test_expressions_cannot_run_code(text: str) -> None:
    with pytest.raises(ArchitectureError, match="which tables may not use"):
        evaluate(text, CONFIG)


def test_a_key_that_is_not_there_is_named() -> None:
    with pytest.raises(ArchitectureError, match="no key 'missing'"):
        evaluate("missing + 1", CONFIG)
    assert names("missing + a * (b or 2)") == {"missing", "a", "b"}
