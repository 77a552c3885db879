"""Evaluate the small expressions that tables use over config keys: `n_inner or 4 * n_embd`, `not attention_bias`.

Only names, constants, arithmetic, comparisons and boolean operators exist: a table cannot run code.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from anysize.errors import ArchitectureError

_BINARY: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_COMPARE: dict[type[ast.AST], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


@cache
def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ArchitectureError(f"the expression '{text}' is not an expression: {error.msg}") from error


@cache
def names(text: str) -> frozenset[str]:
    """Return the config keys that an expression mentions."""
    return frozenset(node.id for node in ast.walk(_parsed(text)) if isinstance(node, ast.Name))


def _value(node: ast.expr, config: Mapping[str, Any], text: str) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            if node.id not in config:
                raise ArchitectureError(f"the config has no key '{node.id}', which the expression '{text}' needs")
            return config[node.id]
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, config, text)
        case ast.BinOp() if type(node.op) in _BINARY:
            return _BINARY[type(node.op)](_value(node.left, config, text), _value(node.right, config, text))
        case ast.BoolOp():
            value: Any = None
            for operand in node.values:
                value = _value(operand, config, text)
                if bool(value) == isinstance(node.op, ast.Or):
                    break
            return value
        case ast.Compare(ops=[op], comparators=[right]) if type(op) in _COMPARE:
            return _COMPARE[type(op)](_value(node.left, config, text), _value(right, config, text))
        case _:
            raise ArchitectureError(f"the expression '{text}' uses '{ast.unparse(node)}', which tables may not use")


def evaluate(text: str, config: Mapping[str, Any]) -> Any:
    """Return the value of `text` over the config's keys; raise ArchitectureError for anything but plain arithmetic."""
    return _value(_parsed(text), config, text)
