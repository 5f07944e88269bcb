"""Bugs planted on purpose: one method is replaced by a wrong one, and a search must find it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings

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


def constant(value: object) -> Wrong:
    """The method always gives the same."""
    return lambda _: lambda *_a, **_k: value


def off_by(amount: int) -> Wrong:
    """A little more or less than right."""
    return lambda original: lambda *a, **k: original(*a, **k) + amount


@contextmanager
def planted(owner: type, method: str, wrong: Wrong) -> Iterator[None]:
    """The method is wrong meanwhile."""
    original = getattr(owner, method)
    setattr(owner, method, wrong(original))
    try:
        yield
    finally:
        setattr(owner, method, original)
