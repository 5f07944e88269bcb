"""Rule 1: core is called, never calls. No clock, I/O, randomness, builtin `hash()`, and no decision
that hangs on the order of a set."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from kit.source import FunctionNode, Source, functions, planted, sources, uphold

# What core may take from the standard library: data structures and arithmetic. A new name here is
# a decision: it must neither look at the world nor change it.
PURE_MODULES = (
    "__future__ abc array base64 bisect collections copy dataclasses decimal enum fractions "
    "functools hashlib heapq itertools json math operator statistics string struct types "
    "typing zlib"
).split()
IMPURE_CALLS = ("hash", "print", "open", "input", "breakpoint")
# These give the same whatever the order they see the items in.
ORDER_BLIND = "sorted min max sum any all len set frozenset".split()
ORDER_TAKING = "list tuple iter next enumerate zip map filter deque".split()
# Methods that make a set of a set.
SET_METHODS = "union intersection difference symmetric_difference copy".split()


def test_core_imports_nothing_that_looks_at_the_world() -> None:
    uphold(line for source in sources("fabric/core") for line in impure_imports(source))


def test_core_calls_nothing_impure() -> None:
    uphold(line for source in sources("fabric/core") for line in impure_calls(source))


def test_no_decision_hangs_on_set_order() -> None:
    uphold(line for source in sources("fabric/core") for line in set_orders(source))


@pytest.mark.parametrize("module", ["time", "random", "asyncio", "logging", "os.path", "threading"])
def test_a_planted_clock_is_caught(module: str) -> None:
    assert len(impure_imports(planted(f"def f():\n    import {module}", "fabric.core.a"))) == 1
    assert len(impure_imports(planted(f"from {module} import x", "fabric.core.a"))) == 1


@pytest.mark.parametrize("text", ["hash((1, 2))", "def f(a):\n    return open(a)", "print('a')"])
def test_a_planted_impure_call_is_caught(text: str) -> None:
    assert len(impure_calls(planted(text, "fabric.core.a"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "for x in {1, 2}: ...",
        "for x in set(a): ...",
        "def f(a: set[int]):\n    for x in a: ...",
        "def f(a: frozenset[int]):\n    return [x for x in a]",
        "seen = set()\nfirst = next(iter(seen))",
        "class A:\n    def f(self):\n        self.a: set[int] = set()\n        return list(self.a)",
        "class A:\n    seen: set[int]\n    def f(self):\n        return self.seen.pop()",
        "for x in set(a) - set(b): ...",
        "def f(a: set[int], b: set[int]):\n    return {x: 1 for x in a & b}",
        "def f(a: set[int]):\n    return [*a]",
        "def f(a: set[int] | None):\n    return tuple(a.union((1,)))",
    ],
)
def test_a_planted_set_order_is_caught(text: str) -> None:
    assert len(set_orders(planted(text, "fabric.core.a"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "for x in sorted({1, 2}): ...",
        "def f(a: set[int]):\n    return sorted(x for x in a if x)",
        "def f(a: set[int]):\n    return {x + 1 for x in a}, len(a), 1 in a, max(a)",
        "def f(a: set[int]): ...\ndef g(a: list[int]):\n    return [x for x in a]",
        "def f(a: dict[int, int]):\n    return [x for x in a], a.pop(1)",
        "def f(a: list[set[int]]):\n    return [x for x in a]",
    ],
)
def test_an_order_that_cannot_matter_passes(text: str) -> None:
    assert not set_orders(planted(text, "fabric.core.a"))


def impure_imports(source: Source) -> list[str]:
    """One line for each module of the standard library outside `PURE_MODULES`."""
    broken = []
    for node in source.nodes:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] not in ("fabric", *PURE_MODULES):
                broken.append(
                    f"{source.at(node)}: core imports {name}; take the value as an argument"
                )
    return broken


def impure_calls(source: Source) -> list[str]:
    """One line for each call of a builtin that does I/O or differs from run to run."""
    return [
        f"{source.at(node)}: core calls {node.func.id}()"
        for node in source.nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in IMPURE_CALLS
    ]


def set_orders(source: Source) -> list[str]:
    """One line for each place where the items of a set are taken one by one.

    A heuristic without types: a set is a literal, a call of `set`, what an operator makes of sets,
    or a name (attributes anywhere in the file, locals within their function) assigned from one or
    annotated as one.
    """
    attributes = {name for name in _set_names(source.tree) if name.startswith("self.")}
    broken = []
    for scope, nodes in _scopes(source):
        names = attributes | set(_set_names(scope, own=nodes))
        blind = {id(argument) for node in nodes for argument in _blind_arguments(node)}
        for node in nodes:
            if id(node) not in blind and any(_is_set(taken, names) for taken in _taken(node)):
                code = ast.unparse(node).splitlines()[0]
                broken.append(f"{source.at(node)}: the order of a set decides in `{code}`; sort it")
    return broken


def _taken(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose order `node` takes."""
    if isinstance(node, ast.For):
        yield node.iter
    elif isinstance(node, ast.ListComp | ast.DictComp | ast.GeneratorExp):
        yield from (generator.iter for generator in node.generators)
    elif isinstance(node, ast.Starred):
        yield node.value
    elif isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id in ORDER_TAKING:
            yield from node.args
        if isinstance(function, ast.Attribute) and function.attr == "pop" and not node.args:
            yield function.value


def _blind_arguments(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.args if node.func.id in ORDER_BLIND else []
    return []


def _is_set(value: ast.expr, names: set[str]) -> bool:
    if isinstance(value, ast.Set | ast.SetComp):
        return True
    if isinstance(value, ast.BinOp):
        return _is_set(value.left, names) or _is_set(value.right, names)
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
        return value.func.id in ("set", "frozenset")
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return value.func.attr in SET_METHODS and _is_set(value.func.value, names)
    named = isinstance(value, ast.Name | ast.Attribute | ast.Subscript)
    return bool(names) and named and ast.unparse(value) in names


def _scopes(source: Source) -> Iterator[tuple[ast.AST, list[ast.AST]]]:
    """The module and every function, each with its nodes but those of functions inside it."""
    yield source.tree, list(_own_nodes(source.tree))
    for function in functions(source):
        yield function, list(_own_nodes(function))


def _own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, FunctionNode):
            yield from _own_nodes(child)


def _set_names(scope: ast.AST, own: list[ast.AST] | None = None) -> Iterator[str]:
    for node in own if own is not None else ast.walk(scope):
        if isinstance(node, ast.Assign) and _is_set(node.value, set()):
            yield from (ast.unparse(target) for target in node.targets)
        elif isinstance(node, ast.AnnAssign) and _says_set(node.annotation):
            yield ast.unparse(node.target)
        elif isinstance(node, ast.arg) and node.annotation and _says_set(node.annotation):
            yield node.arg
        elif isinstance(node, ast.ClassDef):
            yield from (f"self.{name}" for name in _set_names(node, own=list(node.body)))


def _says_set(annotation: ast.expr) -> bool:
    words = ast.unparse(annotation).split("[")[0].split(".")[-1]
    return words in ("set", "frozenset", "AbstractSet", "MutableSet", "Set")
