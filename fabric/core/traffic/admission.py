"""The bounded queue before the engines: by (priority, arrival), or turned away at the door."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

from fabric.core.configs import AdmissionConfig
from fabric.core.ordered import Ordered
from fabric.core.request import Request

NS_PER_S = 1_000_000_000
RETRY_S_MIN = 1.0
RETRY_S_UNMEASURED = 5.0  # nothing has completed yet: about as long as a replica takes to warm up


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The request waits; `ahead_tokens` are queued before it (in order of importance)."""

    ahead_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shed:
    """Turned away. `retry_after_s`: until the queue as it is has drained, at the measured rate."""

    retry_after_s: float
    reason: str


class Admission:
    """Who waits, who is turned away, who is next. The caller asks the router before it takes."""

    def __init__(self, config: AdmissionConfig) -> None:
        if config.max_queued_requests < 1 or config.max_queued_tokens < 1:
            raise ValueError("the queue must hold at least one request and one token")
        self.config = config
        self._queue: Ordered[_Entry] = Ordered()
        self._entries: dict[str, _Entry] = {}
        self._tokens = 0
        self._next_number = 0
        self._drain = DrainRate()

    @property
    def queued_requests(self) -> int:
        """How many wait."""
        return len(self._queue)

    @property
    def queued_tokens(self) -> int:
        """The sum of their `work_tokens`."""
        return self._tokens

    def offer(self, request: Request, now: int) -> Admitted | Shed:
        """Queue a request, or turn it away: the queue is full. `ValueError`: its id is queued.

        A request alone in the queue is taken however long it is: shedding it could never end.
        """
        if request.request_id in self._entries:
            raise ValueError(f"request {request.request_id} is queued already")
        tokens = work_tokens(request)
        if len(self._queue) >= self.config.max_queued_requests:
            return self._shed(f"{len(self._queue)} requests are queued", now)
        if self._entries and self._tokens + tokens > self.config.max_queued_tokens:
            return self._shed(f"{self._tokens} tokens are queued", now)
        entry = _Entry(request, tokens, self._next_number, self._expiry(request, now))
        self._next_number += 1
        ahead = 0
        for other in self._queue.items:
            if other.key > entry.key:
                break
            ahead += other.tokens
        self._queue.add(entry)
        self._entries[request.request_id] = entry
        self._tokens += tokens
        return Admitted(ahead_tokens=ahead)

    def head(self, now: int) -> Request | None:
        """Who is next; it stays queued. Overdue ones are passed over: `expire` collects them."""
        entry = self._first(now)
        return None if entry is None else entry.request

    def take(self, now: int) -> Request | None:
        """Take the next one out: it has a replica."""
        entry = self._first(now)
        if entry is None:
            return None
        self._remove(entry)
        return entry.request

    def cancel(self, request_id: str) -> bool:
        """The client left. False if the request does not wait here (any more)."""
        entry = self._entries.get(request_id)
        if entry is None:
            return False
        self._remove(entry)
        return True

    def expire(self, now: int) -> list[Request]:
        """Take out all that waited longer than the TTL, or past their own deadline."""
        overdue = [entry for entry in self._queue.items if entry.expires <= now]
        for entry in overdue:
            self._remove(entry)
        return [entry.request for entry in overdue]

    def completed(self, request: Request, now: int) -> None:
        """A request that was taken has finished: this is what the drain rate is measured from."""
        self._drain.add(work_tokens(request), now)

    def retry_after_s(self, now: int) -> float:
        """Seconds until what is queued now has drained, at least 1 and at most the TTL."""
        rate = self._drain.per_s(now)
        if rate is None:
            return min(RETRY_S_UNMEASURED, self.config.queue_ttl_s)
        drained_s = self._tokens / max(rate, 1e-9)
        return min(max(drained_s, RETRY_S_MIN), self.config.queue_ttl_s)

    def check(self) -> None:
        """Bounds hold, sums are exact, the order is right."""
        self._queue.check()
        entries = self._queue.items
        assert {id(e) for e in entries} == {id(e) for e in self._entries.values()}, "two views"
        assert len(entries) == len(self._entries) <= self.config.max_queued_requests, "too many"
        assert self._tokens == sum(entry.tokens for entry in entries), "token sum"
        assert len(entries) <= 1 or self._tokens <= self.config.max_queued_tokens, "too long"
        assert all(self._entries[e.request.request_id] is e for e in entries), "wrong name"

    def _expiry(self, request: Request, now: int) -> int:
        ttl = now + int(self.config.queue_ttl_s * NS_PER_S)
        return ttl if request.deadline is None else min(ttl, request.deadline)

    def _first(self, now: int) -> _Entry | None:
        return next((entry for entry in self._queue.items if entry.expires > now), None)

    def _remove(self, entry: _Entry) -> None:
        self._queue.remove(entry)
        del self._entries[entry.request.request_id]
        self._tokens -= entry.tokens

    def _shed(self, reason: str, now: int) -> Shed:
        return Shed(retry_after_s=self.retry_after_s(now), reason=reason)


def work_tokens(request: Request) -> int:
    """What a request weighs here: the tokens to compute before its first new one.

    Its output's length is not known yet; the drain rate is measured in the same unit.
    """
    return len(request.prompt) + sum(map(len, request.generated))


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


class _Entry:
    """One waiting request."""

    __slots__ = ("expires", "key", "request", "tokens")

    def __init__(self, request: Request, tokens: int, number: int, expires: int) -> None:
        self.request = request
        self.tokens = tokens
        self.expires = expires
        self.key = (request.priority, request.arrival, number)
