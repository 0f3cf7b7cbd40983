"""Which tasks the scripts of a job answer, as far as that can be read in their code. Nothing of it is run."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from pathlib import Path

__all__ = ["names_used"]


def names_used(files: Iterable[Path], wanted: Iterable[str]) -> set[str]:
    """Those of `wanted` that some of the Python files use as a name, as an attribute, or as a decorator.

    A file that cannot be read as Python is taken to use all of them.
    """
    left = set(wanted)
    found: set[str] = set()
    for file in files:
        try:
            tree = ast.parse(file.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            return found | left
        for node in ast.walk(tree):
            found.update(_names_of(node) & left)
    return found


def _names_of(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {f"@{name}" for each in node.decorator_list for name in _names_of(_called(each))}
    if isinstance(node, ast.Attribute):
        return {node.attr}
    return {node.id} if isinstance(node, ast.Name) else set()


def _called(node: ast.expr) -> ast.expr:
    return node.func if isinstance(node, ast.Call) else node
