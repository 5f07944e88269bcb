"""How fast does it go? What the wait for a first token and for a whole answer is predicted from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

from fabric.core.snapshot import ReplicaSnapshot

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """What the replicas can do, as they say. 0: unknown.

    `places`: sequences that can run at once, all replicas. `step_ns`, `token_ns`: of one replica, a
    step and one more prompt token in it (the median over replicas).
    """

    replicas: int = 0
    places: int = 0
    step_ns: int = 0
    token_ns: int = 0


def capacity_of(snapshots: Sequence[ReplicaSnapshot]) -> Capacity:
    """Of all of them together."""
    places = [s.places for s in snapshots]
    return Capacity(
        replicas=len(snapshots),
        places=sum(places) if all(places) else 0,
        step_ns=_median([s.step_ns for s in snapshots]),
        token_ns=_median([s.token_ns for s in snapshots]),
    )


def _median(values: list[int]) -> int:
    """Of those that are known; 0: none is."""
    values.sort()
    unknown = bisect_right(values, 0)
    return values[(unknown + len(values)) // 2] if unknown < len(values) else 0


class DrainRate:
    """Tokens per second, exponentially weighted by age (time constant `WINDOW_S`).

    Divided by the weight that the time since the first event has, so that it is right from the
    start and not only after a window.
    """

    WINDOW_S = 10.0

    __slots__ = ("_first", "_last", "_level")

    def __init__(self) -> None:
        self._first: int | None = None
        self._last = 0
        self._level = 0.0

    def add(self, tokens: int, now: int) -> None:
        """So many tokens were completed just now."""
        if self._first is None:  # nothing is known of the time before: it only starts the clock
            self._first = self._last = now
            return
        self._level = self._level * self._decay(now) + tokens / self.WINDOW_S
        self._last = max(self._last, now)

    def per_s(self, now: int) -> float | None:
        """The rate as of `now`; None while unknown."""
        if self._first is None or now <= self._first:
            return None
        seen = 1.0 - exp(-(now - self._first) / (self.WINDOW_S * NS_PER_S))
        return self._level * self._decay(now) / seen

    def _decay(self, now: int) -> float:
        return exp(-max(0, now - self._last) / (self.WINDOW_S * NS_PER_S))


class BacklogSpeed:
    """Queued tokens released a second while something waits: how fast a queue goes down.

    An idle server's throughput says nothing about its speed, so only time with a backlog counts.
    Weighted by how much such time has passed since (time constant `WINDOW_S`).
    """

    WINDOW_S = 10.0
    # With less than this much backlog seen, what replicas say of themselves is the better guess.
    ENOUGH_S = 0.25

    __slots__ = ("_seconds", "_since", "_tokens")

    def __init__(self) -> None:
        self._since: int | None = None  # the backlog goes back to then, as far as not yet counted
        self._seconds = 0.0
        self._tokens = 0.0

    def waits(self, now: int) -> None:
        """Something is in the queue."""
        if self._since is None:
            self._since = now

    def empty(self) -> None:
        """Nothing is, any more."""
        self._since = None

    def released(self, tokens: int, now: int) -> None:
        """Tokens that had to wait left the queue."""
        self._pass(now)
        self._tokens += tokens

    def per_s(self, now: int) -> float | None:
        """Tokens a second; None while unknown. A queue that stands still gets slower by itself."""
        self._pass(now)
        return self._tokens / self._seconds if self._seconds >= self.ENOUGH_S else None

    def _pass(self, now: int) -> None:
        if self._since is None or now <= self._since:
            return
        passed = (now - self._since) / NS_PER_S
        kept = exp(-passed / self.WINDOW_S)
        self._tokens *= kept
        self._seconds = self._seconds * kept + passed
        self._since = now


class TokenPace:
    """Seconds per output token after the first, of answers that are over: a fading mean."""

    FADE = 0.05

    __slots__ = ("_mean",)

    def __init__(self) -> None:
        self._mean: float | None = None

    def add(self, seconds: float) -> None:
        """One answer's."""
        self._mean = seconds if self._mean is None else (
            self._mean + self.FADE * (seconds - self._mean)
        )  # fmt: skip

    def seconds(self) -> float:
        """0 while unknown."""
        return self._mean or 0.0
