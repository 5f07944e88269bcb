"""Bugs planted on purpose: one method is replaced by a wrong one, and a search must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

SEARCH = settings(
    max_examples=300,
    stateful_step_count=30,
    phases=[Phase.generate],
    derandomize=True,
    database=None,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

Wrong = Callable[[Callable[..., Any]], Callable[..., Any]]
# (owner, method, original -> wrong method): wrong in one subtle way.
Mutation = tuple[type | ModuleType, str, Wrong]


def constant(value: object) -> Wrong:
    """The method always gives the same."""
    return lambda _: lambda *_a, **_k: value


def off_by(amount: int) -> Wrong:
    """A little more or less than right."""
    return lambda original: lambda *a, **k: original(*a, **k) + amount


@contextmanager
def planted(owner: type | ModuleType, method: str, wrong: Wrong) -> Iterator[None]:
    """The method is wrong meanwhile."""
    original = getattr(owner, method)
    setattr(owner, method, wrong(original))
    try:
        yield
    finally:
        setattr(owner, method, original)


def must_find(
    machine: type[RuleBasedStateMachine],
    mutation: Mutation,
    *,
    search: settings = SEARCH,
) -> None:
    """The machine sees the bug that is planted, within the examples of `search`."""
    with planted(*mutation), pytest.raises((AssertionError, IndexError, KeyError)):
        run_state_machine_as_test(machine, settings=search)
