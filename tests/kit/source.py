"""The project's own source, parsed once, for the tests of its laws."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One Python file. `module` is its dotted name; `path` is relative to the checkout."""

    path: str
    module: str
    text: str
    tree: ast.Module

    def at(self, node: ast.AST) -> str:
        """`path:line`, which terminals make clickable."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}"


def planted(text: str, module: str = "fabric.planted") -> Source:
    """Source that breaks a law on purpose: each law shows on it that it can fail."""
    path = module.replace(".", "/") + ".py"
    return Source(path=path, module=module, text=text, tree=ast.parse(text))


@cache
def sources(folder: str) -> tuple[Source, ...]:
    """Every Python file below `folder` (of the checkout), in path order."""
    return tuple(_read(path) for path in sorted((ROOT / folder).rglob("*.py")))


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    """Every function and method, nested ones too."""
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            yield node


def uphold(broken: Iterable[str]) -> None:
    """Fail with every violation, a line each, and nothing else."""
    lines = list(broken)
    if lines:
        pytest.fail("\n".join([f"{len(lines)} against the law:", *lines]), pytrace=False)


def _read(path: Path) -> Source:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    text = path.read_text(encoding="utf-8")
    return Source(
        path=str(relative),
        module=".".join(parts[:-1] if parts[-1] == "__init__" else parts),
        text=text,
        tree=ast.parse(text, filename=str(relative)),
    )
