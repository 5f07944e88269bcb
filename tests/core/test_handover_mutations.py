"""As `test_mutations`, of the hand-over: a planted bug must be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.handoff_machine import HandoffMachine
from kit.handover_machine import HandoverMachine
from kit.pairing_machine import PairingMachine
from kit.planting import SEARCH, Wrong, constant, planted

from fabric.core.engine.handover import Expected, Handovers, Landing
from fabric.core.traffic.handoff import Action, Direct, Handoff, Pairing, Stage
from fabric.core.traffic.router import Router


def foreign(_: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever comes is taken for what was asked for."""
    return lambda self, _expected, _arrival: Landing.LANDED


def all_at_once(_: Callable[..., Any]) -> Callable[..., Any]:
    """The blocks of a prompt that is given up are free although a plan copies into them."""

    def drop(self: Handovers, name: str) -> bool:
        expected = self.expected.pop(name, None)
        if expected is not None:
            self._scheduler.pool.release(expected.blocks)
        return expected is not None

    return drop


def half_is_enough(_: Callable[..., Any]) -> Callable[..., Any]:
    """The decode leg goes on when the first group is there."""
    return property(lambda self: self.landed[0])  # type: ignore[return-value]


# A pool that stalls takes many verbs in the right order.
LONGER = settings(SEARCH, max_examples=1500)

HANDOVER: list[tuple[type, str, Wrong]] = [
    (Handovers, "_verdict", foreign),
    (Handovers, "drop", all_at_once),
    (Handovers, "stand_back", constant(False)),
    (Handovers, "stop_export", constant(None)),
    (Handovers, "advanced", constant(None)),
    (Expected, "complete", half_is_enough),
]


def forgets_to_free(original: Callable[..., Any]) -> Callable[..., Any]:
    """A prefill replica that is lost leaves blocks reserved at the other one."""

    def end(self: Handoff, then: Any) -> Any:
        return tuple(one for one in original(self, then) if one is not Action.GIVE_UP or not then)

    return end


def over_twice(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was lost while it decoded is still decoding."""

    def end(self: Handoff, then: Any) -> Any:
        before = self.stage
        found = original(self, then)
        if before is Stage.DECODE:
            self.stage = before
        return found

    return end


def all_of_the_output(original: Callable[..., Any]) -> Callable[..., Any]:
    """What the prefill replica draws is not one token."""
    return lambda self, request, *words, **named: original(
        self, replace(request, expected_tokens=None), *words, **named
    )


def nothing_held(original: Callable[..., Any]) -> Callable[..., Any]:
    """A detour although the decode pool has the prompt."""

    def direct(self: Pairing, request: Any, *pools: Any) -> Any:
        reason = original(self, request, *pools)
        return None if reason is Direct.HELD else reason

    return direct


def any_length(original: Callable[..., Any]) -> Callable[..., Any]:
    """A detour for a prompt of a few tokens."""

    def direct(self: Pairing, request: Any, *pools: Any) -> Any:
        reason = original(self, request, *pools)
        return None if reason is Direct.SHORT else reason

    return direct


def in_either_pool(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who takes no detour may go to a prefill replica."""

    def alone(self: Pairing, request: Any, snapshots: Any, now: int, reason: Any) -> Any:
        others = [station.snapshot for station in self._prefill._stations.values()]
        return original(self, request, [*snapshots, *others], now, reason)

    return alone


PAIRING: list[tuple[type, str, Wrong]] = [
    (Router, "choose", all_of_the_output),
    (Router, "forget", constant(None)),
    (Pairing, "_direct", nothing_held),
    (Pairing, "_direct", any_length),
    (Pairing, "_alone", in_either_pool),
]

HANDOFF: list[tuple[type, str, Wrong]] = [
    (Handoff, "_end", forgets_to_free),
    (Handoff, "_end", over_twice),
    (Handoff, "_end", constant(())),
]


MUTATIONS = [
    pytest.param(machine, *mutation, id=f"{mutation[0].__name__}.{mutation[1]}-{number}")
    for machine, mutations in (
        (HandoverMachine, HANDOVER),
        (HandoffMachine, HANDOFF),
        (PairingMachine, PAIRING),
    )
    for number, mutation in enumerate(mutations)
]


@pytest.mark.parametrize(("machine", "owner", "method", "wrong"), MUTATIONS)
def test_a_planted_bug_is_found(
    machine: type[RuleBasedStateMachine], owner: type, method: str, wrong: Wrong
) -> None:
    found = (AssertionError, IndexError, KeyError)
    with planted(owner, method, wrong), pytest.raises(found):
        run_state_machine_as_test(machine, settings=LONGER)
