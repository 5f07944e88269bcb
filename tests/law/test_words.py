"""Rules 5 and 10: everything is annotated, what is public is described, nothing is put off."""

from __future__ import annotations

import ast
import re

import pytest
from kit.source import ROOT, FunctionNode, Source, functions, planted, sources, uphold

LATER = re.compile(r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX", "HA" + "CK"]) + r")\b")
# The records that cross a seam (rule 5): frozen, slots, kw-only.
SEAMS = (
    "fabric.cluster.reports",
    "fabric.cluster.wire",
    "fabric.core.configs",
    "fabric.core.engine.plan",
    "fabric.core.request",
    "fabric.core.shard",
    "fabric.core.snapshot",
    "fabric.core.tiers",
    "fabric.core.traffic.admission",
    "fabric.core.traffic.router",
    "fabric.gateway.backend",
    "fabric.kernels.program",
)


def test_everything_is_annotated() -> None:
    uphold(line for source in sources("fabric") for line in annotation_violations(source))


def test_what_is_public_has_a_docstring() -> None:
    uphold(line for source in sources("fabric") for line in docstring_violations(source))


def test_records_at_the_seams_are_frozen() -> None:
    at_seams = [source for source in sources("fabric") if source.module in SEAMS]
    uphold(line for source in at_seams for line in record_violations(source))


def test_nothing_is_left_for_later() -> None:
    files = [p for folder in ("fabric", "tests", ".ci") for p in (ROOT / folder).rglob("*")]
    texts = [path for path in files if path.suffix in (".py", ".cpp", ".h", ".md", ".yaml", "")]
    broken = [
        line
        for path in sorted(texts)
        if path.is_file()
        for line in later_violations(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
    ]
    uphold(broken)


@pytest.mark.parametrize(
    "text",
    [
        "def f(a) -> int: ...",
        "def f(a: int): ...",
        "def f(*a) -> int: ...",
        "class A:\n    def f(self, *, b=1) -> None: ...",
    ],
)
def test_a_planted_gap_in_the_types_is_caught(text: str) -> None:
    assert len(annotation_violations(planted(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "x = 1",
        '"""A module."""\nclass A: ...',
        '"""A module."""\ndef f(): ...',
        '"""A module."""\nclass A:\n    """One."""\n    def f(self): ...',
    ],
)
def test_a_planted_silence_is_caught(text: str) -> None:
    assert len(docstring_violations(planted(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "@dataclass\nclass A: ...",
        "@dataclass(frozen=True, slots=True)\nclass A: ...",
        "@dataclass(frozen=False, slots=True, kw_only=True)\nclass A: ...",
    ],
)
def test_a_planted_loose_record_is_caught(text: str) -> None:
    assert len(record_violations(planted(text))) == 1


def test_a_planted_promise_is_caught() -> None:
    assert len(later_violations("a.py", "x = 1  # " + "TO" + "DO: later")) == 1


def annotation_violations(source: Source) -> list[str]:
    """One line for each function whose parameters or result have no type."""
    broken = []
    for function in functions(source):
        missing = [argument.arg for argument in _arguments(function) if argument.annotation is None]
        if function.returns is None:
            missing.append("the result")
        if missing:
            names = ", ".join(missing)
            broken.append(f"{source.at(function)}: {function.name} says no type for {names}")
    return broken


def docstring_violations(source: Source) -> list[str]:
    """One line for each module, class or function without a docstring that others can see."""
    broken = [] if ast.get_docstring(source.tree) else [f"{source.path}: the module says nothing"]
    return broken + [
        f"{source.at(node)}: {node.name} is public and has no docstring"
        for node in _public(source.tree)
        if not ast.get_docstring(node)
    ]


def record_violations(source: Source) -> list[str]:
    """One line for each dataclass that is not frozen, slots and kw-only."""
    broken = []
    for node in source.nodes:
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            name = ast.unparse(call.func if call else decorator).split(".")[-1]
            said = {k.arg: ast.unparse(k.value) for k in call.keywords} if call else {}
            missing = [k for k in ("frozen", "slots", "kw_only") if said.get(k) != "True"]
            if name == "dataclass" and missing:
                broken.append(f"{source.at(node)}: {node.name} lacks {', '.join(missing)}")
    return broken


def later_violations(name: str, text: str) -> list[str]:
    """One line for each note to oneself."""
    return [
        f"{name}:{number}: do it now, or write it into an issue: {line.strip()}"
        for number, line in enumerate(text.splitlines(), start=1)
        if LATER.search(line)
    ]


def _arguments(function: FunctionNode) -> list[ast.arg]:
    arguments = function.args
    found = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    found = [argument for argument in found if argument.arg not in ("self", "cls")]
    return found + [argument for argument in (arguments.vararg, arguments.kwarg) if argument]


def _public(tree: ast.Module | ast.ClassDef) -> list[ast.ClassDef | FunctionNode]:
    """Public classes and functions and, in public classes, public methods."""
    found: list[ast.ClassDef | FunctionNode] = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef | FunctionNode) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += _public(node)
    return found
