"""Virtual time: events in order of (when, in what order they were made)."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000

Event = tuple[int, int, Callable[..., None], tuple[Any, ...]]


class Clock:
    """`now` in ns. Nothing happens between two events, so it jumps from one to the next."""

    __slots__ = ("_heap", "_number", "now")

    def __init__(self) -> None:
        self.now = 0
        self._heap: list[Event] = []
        self._number = 0

    def at(self, when: int, call: Callable[..., None], *arguments: Any) -> None:
        """Call then. Events of one moment keep the order in which they were made."""
        assert when >= self.now, "an event in the past"
        heappush(self._heap, (when, self._number, call, arguments))
        self._number += 1

    def after(self, delay_ns: int, call: Callable[..., None], *arguments: Any) -> None:
        """Call so much later."""
        self.at(self.now + delay_ns, call, *arguments)

    def next_at(self) -> int | None:
        """When the next event is due; None: there is none."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """Let the next event happen."""
        when, _, call, arguments = heappop(self._heap)
        self.now = when
        call(*arguments)
