"""A tenant's own limits: requests and tokens a minute, and how many run at once."""

from __future__ import annotations

from fabric.core.lease import TenantShare
from fabric.core.tenants import Tenant

NS_PER_S = 1_000_000_000
# So much of a minute's allowance may come at once: in any minute at most 7/6 of it.
BURST = 1 / 6


class Bucket:
    """Fills at `per_minute`, up to a sixth of it (at least 1). What costs more than it can hold is
    let through when it is full, and then it is in debt: the long-run rate holds for any cost."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: float, now: int) -> None:
        self.per_minute = per_minute
        self._at = now
        self._level = self.size

    @property
    def size(self) -> float:
        """What it holds when it is full."""
        return max(1.0, self.per_minute * BURST)

    def wait_s(self, cost: float, now: int) -> float:
        """Seconds until so much can be taken; 0: now. Without a rate (there is no lease): 1."""
        self._fill(now)
        missing = min(cost, self.size) - self._level
        if missing <= 1e-9:
            return 0.0
        return min(3600.0, missing * 60 / self.per_minute) if self.per_minute else 1.0

    def take(self, cost: float, now: int) -> None:
        """Take it, into debt if need be; a negative cost gives back."""
        self._fill(now)
        self._level = min(self.size, self._level - cost)

    def resize(self, per_minute: float, now: int) -> None:
        """Another rate from now on; what is in it stays, if it still fits."""
        self._fill(now)
        self.per_minute = per_minute
        self._level = min(self.size, self._level)

    def drain(self) -> None:
        """Nothing is in it now."""
        self._level = min(0.0, self._level)

    def _fill(self, now: int) -> None:
        passed = max(0, now - self._at) / NS_PER_S
        self._level = min(self.size, self._level + passed * self.per_minute / 60)
        self._at = max(self._at, now)


class Meter:
    """One tenant's limits at one dispatcher. None: no limit."""

    __slots__ = ("concurrent", "offered", "requests", "running", "tokens")

    def __init__(self, tenant: Tenant, now: int) -> None:
        per_minute = tenant.requests_per_minute
        self.requests = None if per_minute is None else Bucket(per_minute, now)
        per_minute = tenant.tokens_per_minute
        self.tokens = None if per_minute is None else Bucket(per_minute, now)
        self.concurrent = tenant.max_concurrent
        self.running = 0
        self.offered = 0  # ever, those refused here too

    @property
    def idle(self) -> bool:
        """Nothing is lost if it is forgotten."""
        limited = self.requests or self.tokens or self.concurrent is not None
        return not limited and not self.running

    @property
    def has_place(self) -> bool:
        """May one more run?"""
        return self.concurrent is None or self.running < self.concurrent

    def wait_s(self, tokens: int, now: int) -> float:
        """Seconds until a request of so many tokens is within the limits; 0: now."""
        wait = 0.0 if self.requests is None else self.requests.wait_s(1, now)
        return wait if self.tokens is None else max(wait, self.tokens.wait_s(tokens, now))

    def spend(self, tokens: int, now: int) -> None:
        """A request of so many tokens is let in."""
        if self.requests is not None:
            self.requests.take(1, now)
        self.correct(tokens, now)

    def resize(self, share: TenantShare, now: int) -> None:
        """Its limits here are these from now on."""
        if self.requests is not None:
            self.requests.resize(share.requests_per_minute or 0.0, now)
        if self.tokens is not None:
            self.tokens.resize(share.tokens_per_minute or 0.0, now)
        if self.concurrent is not None:
            self.concurrent = share.max_concurrent or 0

    def close(self, now: int) -> None:
        """Whatever is limited gets nothing new."""
        for bucket in (self.requests, self.tokens):
            if bucket is not None:
                bucket.resize(0.0, now)
                bucket.drain()
        if self.concurrent is not None:
            self.concurrent = 0

    def correct(self, tokens: int, now: int) -> None:
        """So many tokens more than was thought (below 0: fewer)."""
        if self.tokens is not None:
            self.tokens.take(tokens, now)
