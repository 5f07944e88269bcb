"""`RingChannel` holds under any order of verbs, and the search sees planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from kit.planting import Mutation, constant, must_find
from kit.ring_machine import RingMachine

from fabric.worker.channel import ChannelClosed
from fabric.worker.plan_ring import RingChannel, _Way

TestRing = RingMachine.TestCase
TestRing.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def without_a_turn(_: Callable[..., Any]) -> Callable[..., Any]:
    """What does not fit behind the last byte waits, although there is room in front."""

    def put(self: _Way, data: memoryview) -> int:
        written = self._written.value
        at = written % self._bytes
        room = self._bytes - (written - self._read.value) % (1 << 32)
        count = min(room, len(data), self._bytes - at)
        self._ring[at : at + count] = data[:count]
        self._written.value = (written + count) % (1 << 32)
        return count

    return put


def counts_that_grow(_: Callable[..., Any]) -> Callable[..., Any]:
    """Room is reckoned without the turn of the counts at four gibibytes."""

    def put(self: _Way, data: memoryview) -> int:
        written = self._written.value
        count = max(0, min(self._bytes - (written - self._read.value), len(data)))
        for place in range(count):
            self._ring[(written + place) % self._bytes] = data[place]
        self._written.value = (written + count) % (1 << 32)
        return count

    return put


def one_byte_too_many(_: Callable[..., Any]) -> Callable[..., Any]:
    """The first byte that was not read is overwritten when the ring is full."""

    def put(self: _Way, data: memoryview) -> int:
        written = self._written.value
        room = self._bytes - (written - self._read.value) % (1 << 32)
        count = min(room + 1, len(data))
        for place in range(count):
            self._ring[(written + place) % self._bytes] = data[place]
        self._written.value = (written + count) % (1 << 32)
        return count

    return put


def read_and_kept(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was read is still under way."""

    def take(self: _Way) -> bytes:
        before = self._read.value
        data = bytes(original(self))
        self._read.value = before
        return data

    return take


def woken_late(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who waits for room sleeps although some was made."""

    def full(self: _Way) -> Any:
        word, _ = original(self)
        return word, word.value

    return full


def woken_never(original: Callable[..., Any]) -> Callable[..., Any]:
    """Who waits for bytes sleeps although some have come."""

    def empty(self: _Way) -> Any:
        word, _ = original(self)
        return word, word.value

    return empty


def the_end_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was sent before the channel closed is lost."""

    def receive(self: RingChannel, timeout_s: float | None) -> bytes:
        if self._words[0].value:
            raise ChannelClosed("the channel is closed")
        return bytes(original(self, timeout_s))

    return receive


PLANTED: list[Mutation] = [
    (_Way, "put", without_a_turn),
    (_Way, "put", counts_that_grow),
    (_Way, "put", one_byte_too_many),
    (_Way, "take", read_and_kept),
    (_Way, "full", woken_late),
    (_Way, "empty", woken_never),
    (RingChannel, "receive", the_end_first),
    (RingChannel, "close", constant(None)),
]


@pytest.mark.parametrize("mutation", PLANTED)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    must_find(RingMachine, mutation)
