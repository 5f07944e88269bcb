"""`WakeUp` and `Rebuilds` hold in any order, and the search sees planted bugs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.planting import Mutation, constant, must_find
from kit.waking_machines import RebuildMachine, WakeMachine

from fabric.cluster.rebuilds import REBUILDS_MAX, Rebuilds
from fabric.cluster.wake_up import WakeUp

Machine = type[RuleBasedStateMachine]


@pytest.mark.parametrize("machine", [WakeMachine, RebuildMachine])
def test_machine(machine: Machine) -> None:
    run_state_machine_as_test(machine, settings=settings(max_examples=30, stateful_step_count=30))


def each_knock(_: Callable[..., Any]) -> Callable[..., Any]:
    """A call for everybody who waits: Serve would start a replica for each."""

    def knock(self: WakeUp) -> None:
        self._task = asyncio.get_running_loop().create_task(self._wait())

    return knock


def once(_: Callable[..., Any]) -> Callable[..., Any]:
    """A call that failed is never made again."""

    def knock(self: WakeUp) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._wait())

    return knock


def up_in_any_case(_: Callable[..., Any]) -> Callable[..., Any]:
    """A call that failed means that somebody is there."""

    async def wait(self: WakeUp) -> None:
        try:
            await self._calls.wake()
        except Exception:  # noqa: BLE001 - as the original
            await asyncio.sleep(0)
        await self._on_awake()

    return wait


def and_no_news(_: Callable[..., Any]) -> Callable[..., Any]:
    """A replica is there, and nobody looks until the next heartbeat."""

    async def wait(self: WakeUp) -> None:
        try:
            await self._calls.wake()
        except Exception:  # noqa: BLE001 - as the original
            return

    return wait


def beside_another(original: Callable[..., Any]) -> Callable[..., Any]:
    """One begins while another is under way."""

    def allowed(self: Rebuilds, now_s: float) -> bool:
        before, self.under_way = self.under_way, False
        found = bool(original(self, now_s))
        self.under_way = before
        return found

    return allowed


def for_life(original: Callable[..., Any]) -> Callable[..., Any]:
    """The first ones count for ever."""

    def begin(self: Rebuilds, now_s: float, *, hung: bool) -> None:
        if len(self._last) == REBUILDS_MAX:
            self._last = deque(self._last, maxlen=REBUILDS_MAX + 1)
        original(self, now_s, hung=hung)

    return begin


def never_counted(original: Callable[..., Any]) -> Callable[..., Any]:
    """As often as it breaks."""

    def begin(self: Rebuilds, now_s: float, *, hung: bool) -> None:
        original(self, now_s, hung=hung)
        self._last.clear()

    return begin


WAKE: list[Mutation] = [
    (WakeUp, "knock", each_knock),
    (WakeUp, "knock", once),
    (WakeUp, "_wait", up_in_any_case),
    (WakeUp, "_wait", and_no_news),
]
REBUILD: list[Mutation] = [
    (Rebuilds, "allowed", beside_another),
    (Rebuilds, "begin", for_life),
    (Rebuilds, "begin", never_counted),
    (Rebuilds, "stop", constant(None)),
]
MUTATIONS = [
    *((WakeMachine, mutation) for mutation in WAKE),
    *((RebuildMachine, mutation) for mutation in REBUILD),
]


@pytest.mark.parametrize(("machine", "mutation"), MUTATIONS)
def test_a_planted_bug_is_found(machine: Machine, mutation: Mutation) -> None:
    must_find(machine, mutation)
