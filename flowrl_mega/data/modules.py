"""Which modules the tests of rows import: a program's judge must have them, or no answer to the row can be graded."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any


def modules_of_tests(row: dict[str, Any]) -> set[str]:
    """The modules that the tests of a row cannot do without, by the first part of their names.

    Of tests that are code (`"type": "check"`) and of their stub; what stands in a `try` may be missing. The other
    forms of tests import nothing.
    """
    tests = row.get("tests")
    if not isinstance(tests, dict) or tests.get("type") != "check":
        return set()
    return {name for part in ("code", "stub") for name in _imported(tests.get(part))}


def _imported(code: Any) -> Iterator[str]:
    try:
        waiting: list[ast.AST] = [ast.parse(code)]
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # a stub may be a bare signature
        return
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]
        elif not isinstance(node, ast.Try):
            waiting += ast.iter_child_nodes(node)
