"""Stop strings are found wherever the text is cut, and the search sees planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from kit.planting import Mutation, constant, must_find
from kit.stop_machine import StopMachine

from fabric.gateway.stops import StopAutomaton, StopSearch

TestStops = StopMachine.TestCase
TestStops.settings = settings(max_examples=60, stateful_step_count=15)


def from_the_start_again(original: Callable[..., Any]) -> Callable[..., Any]:
    """A stop that nearly came hides the one that begins inside it."""

    def link(self: StopAutomaton) -> None:
        original(self)
        self.fail = [0] * len(self.go)

    return link


def the_shortest(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of two stops that end together the shorter one counts."""

    def link(self: StopAutomaton) -> None:
        original(self)
        inner = [self.match[back] for back in self.fail]
        self.match = [
            one if shorter is None else shorter
            for one, shorter in zip(self.match, inner, strict=True)
        ]

    return link


def forgets_the_pieces(original: Callable[..., Any]) -> Callable[..., Any]:
    """A stop in two pieces is none."""

    def push(self: StopSearch, text: str) -> str:
        self._state = 0
        return str(original(self, text))

    return push


def nothing_held(original: Callable[..., Any]) -> Callable[..., Any]:
    """What begins a stop is shown at once."""
    return lambda self, text: original(self, text) + self.flush()


def all_held(original: Callable[..., Any]) -> Callable[..., Any]:
    """Text is held back while it may still be no stop at all."""

    def push(self: StopSearch, text: str) -> str:
        shown = original(self, text)
        if self.found is not None or len(shown) < 2:
            return str(shown)
        self._held = shown[-1] + self._held
        return str(shown[:-1])

    return push


def with_the_stop(original: Callable[..., Any]) -> Callable[..., Any]:
    """The stop itself is shown too."""

    def push(self: StopSearch, text: str) -> str:
        return str(original(self, text)) + (self.found or "")

    return push


PLANTED: list[Mutation] = [
    (StopAutomaton, "_link", from_the_start_again),
    (StopAutomaton, "_link", the_shortest),
    (StopAutomaton, "_link", constant(None)),
    (StopSearch, "push", forgets_the_pieces),
    (StopSearch, "push", nothing_held),
    (StopSearch, "push", all_held),
    (StopSearch, "push", with_the_stop),
    (StopSearch, "flush", constant("")),
]


@pytest.mark.parametrize("mutation", PLANTED)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    must_find(StopMachine, mutation)
