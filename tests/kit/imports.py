"""What a file imports, wherever in it: the import law and the packaging test both ask."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from kit.source import FunctionNode, Source


def imports(source: Source) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every (node, imported name, is it inside a function). Submodules are named in full."""
    late = [_span(node) for node in source.nodes if _is_late(node)]
    for node in source.nodes:
        if not isinstance(node, ast.Import | ast.ImportFrom | ast.Call):
            continue
        for name in _names(source, node):
            begin, _ = _span(node)
            yield node, name, any(first < begin < last for first, last in late)


def _names(source: Source, node: ast.Import | ast.ImportFrom | ast.Call) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = _absolute(source, node)
        return [f"{base}.{alias.name}" for alias in node.names]
    if not _is_dynamic_import(node):
        return []
    argument = node.args[0] if node.args else None
    literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return [str(argument.value) if literal else "(computed at run time)"]


def _span(node: ast.AST) -> tuple[tuple[int, int], tuple[int, int]]:
    """From its first character to behind its last."""
    assert isinstance(node, ast.stmt | ast.expr)
    end = node.end_lineno or node.lineno, node.end_col_offset or 0
    return (node.lineno, node.col_offset), end


def _is_late(node: ast.AST) -> bool:
    """What is in it is not imported with the module."""
    return isinstance(node, FunctionNode | ast.Lambda) or _is_for_types(node)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _absolute(source: Source, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = source.module.split(".")
    is_package = source.path.endswith("__init__.py")
    package = package[: len(package) - node.level + is_package]
    return ".".join([*package, node.module] if node.module else package)


def _is_dynamic_import(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
    name = node.func.id if isinstance(node.func, ast.Name) else name
    return name in ("import_module", "__import__")
