"""What a file imports, wherever in it: the import law and the packaging test both ask."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from kit.source import FunctionNode, Source


def imports(source: Source) -> Iterator[tuple[ast.AST, str, bool]]:
    """Every (node, imported name, is it inside a function). Submodules are named in full."""
    for node, inside in _walk(source.tree, inside=False):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name, inside
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(source, node)
            for alias in node.names:
                yield node, f"{base}.{alias.name}", inside
        elif isinstance(node, ast.Call) and _is_dynamic_import(node):
            argument = node.args[0] if node.args else None
            literal = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
            yield node, str(argument.value) if literal else "(computed at run time)", inside


def _walk(tree: ast.AST, *, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(tree):
        yield child, inside
        late = isinstance(child, FunctionNode | ast.Lambda) or _is_for_types(child)
        yield from _walk(child, inside=inside or late)


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
