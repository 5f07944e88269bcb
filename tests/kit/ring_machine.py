"""A `RingChannel` of 16 bytes a way, both ends in one thread: against two strings of bytes.

Nobody waits here, so every order of puts, takes and closes is tried; that sleepers are woken is a
matter of processes (`test_channels`). Counts begin shortly before they wrap around.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fabric.worker.channel import LENGTH_BYTES, ChannelClosed
from fabric.worker.plan_ring import RingChannel

RING = 16
WRAP = 1 << 32

ends = st.integers(0, 1)


class RingMachine(RuleBasedStateMachine):
    """End 0 is the maker. What end e has sent and the other has not taken: `under_way[e]`."""

    @initialize(before=st.tuples(*[st.integers(0, 40)] * 2))
    def build(self, before: tuple[int, int]) -> None:
        maker = RingChannel.create(RING)
        self.ends = maker, RingChannel.attach(maker.address)
        for way, early in enumerate(before):
            for word in self.ends[way]._words[3 + 2 * way : 5 + 2 * way]:
                word.value = WRAP - early
        self.under_way = [b"", b""]
        self.framed = [True, True]  # only whole messages were put
        self.sent: list[list[bytes]] = [[], []]
        self.read = [0, 0]  # of those sent, how many have left the ring
        self.closed = False
        self.number = 0

    @precondition(lambda self: not self.closed)
    @rule(end=ends, size=st.integers(0, 12))
    def send(self, end: int, size: int) -> None:
        """A message that there is room for: nothing waits for it."""
        if LENGTH_BYTES + size > RING - len(self.under_way[end]) or not self.framed[end]:
            return
        data = self.bytes_of(size)
        try:
            self.ends[end].send(data, 0.0)
        except ChannelClosed:
            raise AssertionError("there was room") from None
        self.under_way[end] += size.to_bytes(LENGTH_BYTES, "little") + data
        self.sent[end].append(data)

    @rule(end=ends)
    def receive(self, end: int) -> None:
        """Whatever was sent before the end closed comes first."""
        there = 1 - end
        if not self.framed[there]:
            return
        if self.sent[there]:
            try:
                found = self.ends[end].receive(0.0)
            except (ChannelClosed, TimeoutError):
                raise AssertionError("there was a message") from None
            if not self.read[there]:  # everything that is there is taken at once
                self.read[there] = len(self.sent[there])
                self.under_way[there] = b""
            self.read[there] -= 1
            assert found == self.sent[there].pop(0), "not what was sent"
            return
        problem = failure(lambda: self.ends[end].receive(0.0))
        assert problem is (ChannelClosed if self.closed else TimeoutError), "open, or closed"

    @rule(end=ends, size=st.integers(0, 24))
    def put(self, end: int, size: int) -> None:
        """Any bytes: as many as there is room for."""
        if self.sent[end]:
            return
        data = self.bytes_of(size)
        written = self.ends[end]._out.put(memoryview(data))
        assert written == min(size, RING - len(self.under_way[end])), "room"
        self.under_way[end] += data[:written]
        self.framed[end] = self.framed[end] and not written

    @rule(end=ends)
    def take(self, end: int) -> None:
        there = 1 - end
        if self.sent[there]:
            return
        assert self.ends[end]._in.take() == self.under_way[there], "bytes"
        self.under_way[there] = b""
        self.framed[there] = True

    @precondition(lambda self: not self.closed)
    @rule(end=ends)
    def close(self, end: int) -> None:
        """Either end, and both know."""
        self.ends[end].close()
        self.closed = True

    @precondition(lambda self: self.closed)
    @rule(end=ends)
    def send_after_the_end(self, end: int) -> None:
        problem = failure(lambda: self.ends[end].send(b"late", 0.0))
        assert problem is ChannelClosed, "nobody will read it"

    @invariant()
    def sleeps_exactly_while_there_is_a_reason(self) -> None:
        """The kernel puts to sleep who finds the word at the value that it is told."""
        if not hasattr(self, "ends"):
            return
        for end, channel in enumerate(self.ends):
            mine, theirs = self.under_way[end], self.under_way[1 - end]
            assert asleep(channel._out.full()) == (len(mine) == RING), "no room, or some"
            assert asleep(channel._in.empty()) == (not theirs), "something to read, or nothing"

    def bytes_of(self, size: int) -> bytes:
        """No two neighbours alike, and never the same twice."""
        self.number += size
        return bytes((self.number + at) % 251 for at in range(size))


def asleep(reason: tuple[ctypes.c_uint32, int]) -> bool:
    """Would a futex wait?"""
    word, seen = reason
    return word.value == seen


def failure(verb: Callable[[], object]) -> type[Exception] | None:
    """What it raises."""
    try:
        verb()
    except (ChannelClosed, TimeoutError) as problem:
        return type(problem)
    return None
