"""Bugs planted in `Journey` and `Quarantine`: the machine's search must find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis.stateful import run_state_machine_as_test
from kit.journey_machine import JourneyMachine
from kit.planting import SEARCH, Wrong, constant, planted

from fabric.core.traffic.journey import Journey
from fabric.core.traffic.quarantine import Quarantine


def any_of_them(_: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever was there twice is guilty, also where another one could have been it."""

    def died(self: Quarantine, replica_id: str, at_work: Any = None) -> tuple[str, ...]:
        there = [name for name, where in self._on.items() if where == replica_id]
        found = tuple(name for name in there if name in self._deaths)
        for name in there:
            self._deaths[name] = min(self._deaths.get(name, 0) + 1, 2)
            self.left(name)
        return found

    return died


def the_same_name(_: Callable[..., Any]) -> Callable[..., Any]:
    """An earlier replica is heard as the one of now."""
    return property(lambda self: self.request.request_id)


JOURNEY: list[tuple[type, str, Wrong]] = [
    (Quarantine, "died", any_of_them),
    (Quarantine, "tests", constant(False)),
    (Quarantine, "_is_deadly", constant(False)),
    (Quarantine, "proven", constant(False)),
    (Journey, "name", the_same_name),
    (Journey, "outgoing", lambda _: lambda self: self.request),
]


@pytest.mark.parametrize(("owner", "method", "wrong"), JOURNEY)
def test_a_planted_bug_is_found(owner: type, method: str, wrong: Wrong) -> None:
    with planted(owner, method, wrong), pytest.raises(AssertionError):
        run_state_machine_as_test(JourneyMachine, settings=SEARCH)
