"""The project's own source, parsed once, for the tests of its laws."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKS = (ast.expr_context, ast.operator, ast.boolop, ast.unaryop, ast.cmpop)
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One Python file. `module` is its dotted name; `path` is relative to the checkout; `nodes`
    are all of the tree's, walked once for all laws."""

    path: str
    module: str
    text: str
    tree: ast.Module
    nodes: tuple[ast.AST, ...]

    def at(self, node: ast.AST) -> str:
        """`path:line`, which terminals make clickable."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def planted(text: str, module: str = "fabric.planted") -> Source:
    """Source that breaks a law on purpose: each law shows on it that it can fail."""
    return _source(module.replace(".", "/") + ".py", module, text)


@cache
def sources(folder: str) -> tuple[Source, ...]:
    """Every Python file below `folder` (of the checkout), in path order."""
    gc.disable()  # half a million nodes that all stay: the collector would look at them for long
    try:
        return tuple(_read(path) for path in sorted((ROOT / folder).rglob("*.py")))
    finally:
        gc.enable()


def functions(source: Source) -> Iterator[FunctionNode]:
    """Every function and method, nested ones too."""
    for node in source.nodes:
        if isinstance(node, FunctionNode):
            yield node


def uphold(broken: Iterable[str]) -> None:
    """Fail with every violation, a line each, and nothing else."""
    lines = list(broken)
    if lines:
        pytest.fail("\n".join([f"{len(lines)} against the law:", *lines]), pytrace=False)


@cache
def _read(path: Path) -> Source:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return _source(str(relative), module, path.read_text(encoding="utf-8"))


def _source(path: str, module: str, text: str) -> Source:
    tree = ast.parse(text, filename=path)
    return Source(path=path, module=module, text=text, tree=tree, nodes=tuple(_walk(tree)))


def _walk(tree: ast.Module) -> list[ast.AST]:
    """As `ast.walk`, without what only says how its parent is meant (`Load`, `Add`)."""
    found: list[ast.AST] = [tree]
    for node in found:
        for name in node._fields:
            value = getattr(node, name, None)
            if type(value) is list:
                found += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST) and not isinstance(value, MARKS):
                found.append(value)
    return found
