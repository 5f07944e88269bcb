"""The machines of the SLO see the bugs that they are there for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.ladder_machine import LadderMachine
from kit.lease_machine import LeaseMachine
from kit.planting import SEARCH, Wrong, constant, planted
from kit.slo_machine import LedgerMachine

from fabric.core.attainment import Outcome
from fabric.core.control import slo as slo_module
from fabric.core.control.degrade import Ladder
from fabric.core.control.leases import LeaseSplit
from fabric.core.control.slo import Counts, Ledger
from fabric.core.sketch import Sketch


def a_little_patience(original: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever came a moment too late is on time."""
    return lambda self, outcome, now: original(
        self, replace(outcome, ttft_s=outcome.ttft_s and outcome.ttft_s - 0.001), now
    )


def no_deadlines(original: Callable[..., Any]) -> Callable[..., Any]:
    """Deadlines do not count."""
    return lambda self, outcome, now: original(self, replace(outcome, deadline_kept=True), now)


def forgets_the_refused(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who was turned away is not in the books."""

    def observe(self: Ledger, outcome: Outcome, now: int) -> Any:
        return False if outcome.refused else original(self, outcome, now)

    return observe


def tokens_of_all(original: Callable[..., Any]) -> Callable[..., Any]:
    """One page is counted for both."""
    return lambda self, other: original(self, self if other.requests else other)


def one_bucket_off(original: Callable[..., Any]) -> Callable[..., Any]:
    """The next bucket."""
    return lambda self, bucket, count: original(self, bucket + 2, count)


LEDGER: list[tuple[type, str, Wrong]] = [
    (Ledger, "observe", a_little_patience),
    (Ledger, "observe", no_deadlines),
    (Ledger, "observe", forgets_the_refused),
    (slo_module._Book, "forget", constant(None)),
    (Counts, "plus", tokens_of_all),
    (Sketch, "_put", one_bucket_off),
    (Sketch, "merge", constant(None)),
]

LADDER: list[tuple[type, str, Wrong]] = [
    (Ladder, "_protected", constant(["interactive", "standard", "batch"])),
    (Ladder, "_lasts", constant(True)),
    (Ladder, "_calm", constant(True)),
]


def last_grant_only(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who was given a new lease can't be living by the one before."""

    def hear(self: LeaseSplit, demands: Any, now: int) -> None:
        original(self, demands, now)
        for known in self._known.values():
            known.grants = known.grants[-1:]

    return hear


def the_silent_are_dead(original: Callable[..., Any]) -> Callable[..., Any]:
    """What one holds that was not heard of is given to the others at once."""

    def hear(self: LeaseSplit, demands: Any, now: int) -> None:
        names = {one.dispatcher_id for one in demands}
        self._known = {name: one for name, one in self._known.items() if name in names}
        original(self, demands, now)

    return hear


def nothing_runs(original: Callable[..., Any]) -> Callable[..., Any]:
    """What still runs of an old lease needs no place."""
    return lambda self, demands, now: original(
        self, [replace(one, running=()) for one in demands], now
    )


def nothing_comes_back(original: Callable[..., Any]) -> Callable[..., Any]:
    """Leases that have run out are counted for ever."""
    return lambda self, demands, now: original(self, demands, 0)


LEASES: list[tuple[type, str, Wrong]] = [
    (LeaseSplit, "_hear", last_grant_only),
    (LeaseSplit, "_hear", the_silent_are_dead),
    (LeaseSplit, "_hear", nothing_runs),
    (LeaseSplit, "_hear", nothing_comes_back),
]

MUTATIONS = [
    pytest.param(machine, *mutation, id=f"{mutation[0].__name__}.{mutation[1]}-{number}")
    for machine, mutations in (
        (LedgerMachine, LEDGER),
        (LadderMachine, LADDER),
        (LeaseMachine, LEASES),
    )
    for number, mutation in enumerate(mutations)
]


@pytest.mark.parametrize(("machine", "owner", "method", "wrong"), MUTATIONS)
def test_a_planted_bug_is_found(
    machine: type[RuleBasedStateMachine], owner: type, method: str, wrong: Wrong
) -> None:
    with planted(owner, method, wrong), pytest.raises((AssertionError, IndexError, KeyError)):
        run_state_machine_as_test(machine, settings=SEARCH)
