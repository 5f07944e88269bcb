"""Rule 9: no state machine without a bug that was planted in it and found."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

import pytest
from kit.source import Source, planted, sources, uphold

# Machines without `check()`: what they hold shows at their ends.
OTHERS = (
    "Detours",
    "Link",
    "Mailbox",
    "Outbox",
    "Rebuilds",
    "Replicas",
    "RingChannel",
    "Shelf",
    "StopAutomaton",
    "StopSearch",
    "WakeUp",
)


def test_every_machine_has_a_planted_bug() -> None:
    uphold(unplanted(sources("fabric/core"), OTHERS, sources("tests")))


def test_a_machine_without_one_is_caught() -> None:
    core = planted("class A:\n    def check(self): ...\nclass _B:\n    def check(self): ...")
    assert len(unplanted([core], (), [])) == 1
    assert len(unplanted([core], ("C",), [planted('PLANTED = [(A, "take", constant(0))]')])) == 1


@pytest.mark.parametrize("text", ['(A, "take", x)', '(module.A, "take", constant(None))'])
def test_a_mutation_is_seen(text: str) -> None:
    assert list(mutated(planted(f"BUGS = [{text}]"))) == ["A"]


def unplanted(core: Iterable[Source], others: Iterable[str], tests: Iterable[Source]) -> list[str]:
    """One line for each machine that no mutation names. A private class is its owner's business."""
    found = {name for source in tests for name in mutated(source)}
    machines = [*others, *(name for source in core for name in checked(source))]
    return [f"{name}: no test plants a bug in it" for name in machines if name not in found]


def checked(source: Source) -> Iterator[str]:
    """Public classes that check themselves."""
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [one.name for one in node.body if isinstance(one, ast.FunctionDef)]
            if "check" in methods:
                yield node.name


def mutated(source: Source) -> Iterator[str]:
    """Classes that stand first in an (owner, "method", wrong)."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List):
            for item in node.value.elts:
                if isinstance(item, ast.Tuple) and len(item.elts) == 3:
                    owner, method, _ = item.elts
                    if isinstance(method, ast.Constant) and isinstance(method.value, str):
                        yield owner.attr if isinstance(owner, ast.Attribute) else ast.unparse(owner)
