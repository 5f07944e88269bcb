"""What waits: a line for each tier and tenant, ordered by when a request must start.

    must start by  =  the earlier of  arrival + the tier's TTFT target - its prefill,
                                      its deadline - its whole service,
                      but not before it arrived;  plus `priority` times the TTFT target

Slack is that instant minus now. All slacks shrink at the same pace, so the order by slack never
changes while requests wait and the instant is a constant: whoever waits ages by itself, as those
who come later must start later. What bounds it: `priority` is clamped to +-`PRIORITIES`, so a
request can only be overtaken in its line by one that arrives within (1 + 2 * `PRIORITIES`) TTFT
targets after it. From then on what is ahead of it only shrinks, and it is at most what the tier's
queue holds: with B queued tokens at most and a share s of the speed v (fair shares see to it, up to
their own bound U), nobody waits longer than

    (1 + 2 * PRIORITIES) * ttft  +  (B + U) / (s * v)

or than the queue's TTL, if that is shorter.
"""

from __future__ import annotations

from collections.abc import Iterator

from fabric.core.ordered import Ordered
from fabric.core.request import Request
from fabric.core.tiers import Tier
from fabric.core.traffic.lengths import Estimate

NS_PER_MS = 1_000_000
PRIORITIES = 4


class Entry:
    """One waiting request. `spent`: of its tenant's rate. `again`: it has run before."""

    __slots__ = (
        "again",
        "expected",
        "expires",
        "key",
        "offered",
        "rank",
        "request",
        "spent",
        "tokens",
    )

    def __init__(self, request: Request, tokens: int, rank: int, expected: Estimate) -> None:
        self.request = request
        self.tokens = tokens
        self.rank = rank
        self.expected = expected
        self.again = False
        self.spent = 0
        self.offered = 0
        self.expires = 0
        self.key = (0, 0, 0)


def starts_by(request: Request, tier: Tier, prefill_ns: int, service_ns: int) -> int:
    """The instant that the order goes by, ns: see above."""
    target = tier.ttft_ms * NS_PER_MS
    latest = request.arrival + target - prefill_ns
    if request.deadline is not None:
        latest = min(latest, request.deadline - service_ns)
    steps = min(PRIORITIES, max(-PRIORITIES, request.priority))
    return max(latest, request.arrival) + steps * target


class Line:
    """One tenant's requests in one tier."""

    __slots__ = ("_queue", "tokens")

    def __init__(self) -> None:
        self._queue: Ordered[Entry] = Ordered()
        self.tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def entries(self) -> list[Entry]:
        """In order; for reading."""
        return self._queue.items

    def add(self, entry: Entry) -> None:
        """Put it in its place."""
        self._queue.add(entry)
        self.tokens += entry.tokens

    def remove(self, entry: Entry) -> None:
        """Take out an entry that is there."""
        self._queue.remove(entry)
        self.tokens -= entry.tokens

    def ahead_of(self, key: tuple[int, int, int]) -> int:
        """Tokens queued before such a key."""
        ahead = 0
        for entry in self._queue.items:
            if entry.key > key:
                break
            ahead += entry.tokens
        return ahead

    def check(self) -> None:
        """In order, and the sum is exact."""
        self._queue.check()
        assert self.tokens == sum(entry.tokens for entry in self._queue.items), "line's tokens"


class Lines:
    """All lines of a queue. Sums are kept: a look costs nothing."""

    def __init__(self, tiers: int) -> None:
        self._lines: list[dict[str, Line]] = [{} for _ in range(tiers)]
        self.requests_by_tier = [0] * tiers
        self.tokens_by_tier = [0] * tiers
        self._entries: dict[str, Entry] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def tokens(self) -> int:
        """Of all of them."""
        return sum(self.tokens_by_tier)

    def get(self, request_id: str) -> Entry | None:
        """The entry of a request that waits."""
        return self._entries.get(request_id)

    def line(self, rank: int, tenant: str) -> Line | None:
        """None: nothing waits there."""
        return self._lines[rank].get(tenant)

    def of_tenant(self, tenant: str) -> tuple[int, int]:
        """Requests and tokens of a tenant, in all tiers."""
        lines = [lines[tenant] for lines in self._lines if tenant in lines]
        return sum(map(len, lines)), sum(line.tokens for line in lines)

    def next_key(self, starts: int) -> tuple[int, int, int]:
        """The key of an entry that comes now."""
        self._number += 1
        return (starts, self._number, 0)

    def add(self, entry: Entry) -> None:
        """It waits."""
        line = self._lines[entry.rank].setdefault(entry.request.tenant, Line())
        line.add(entry)
        self._entries[entry.request.request_id] = entry
        self.requests_by_tier[entry.rank] += 1
        self.tokens_by_tier[entry.rank] += entry.tokens

    def remove(self, entry: Entry) -> None:
        """It does not, any more."""
        lines = self._lines[entry.rank]
        line = lines[entry.request.tenant]
        line.remove(entry)
        if not len(line):
            del lines[entry.request.tenant]
        del self._entries[entry.request.request_id]
        self.requests_by_tier[entry.rank] -= 1
        self.tokens_by_tier[entry.rank] -= entry.tokens

    def below(self, rank: int) -> Iterator[Entry]:
        """Entries of less important tiers: the cheapest tier first, there the newest first."""
        for lines in self._lines[:rank:-1]:
            entries = [entry for line in lines.values() for entry in line.entries]
            yield from sorted(entries, key=lambda entry: entry.key[1], reverse=True)

    def waiting(self, rank: int, tenants: list[str], now: int) -> Iterator[Request]:
        """Line by line, those whose time is not over."""
        for tenant in tenants:
            line = self._lines[rank].get(tenant)
            for entry in () if line is None else line.entries:
                if entry.expires > now:
                    yield entry.request

    def overdue(self, now: int) -> list[Entry]:
        """Those whose time is over, oldest first."""
        found = [entry for entry in self._entries.values() if entry.expires <= now]
        return sorted(found, key=lambda entry: entry.key[1])

    def flows(self) -> Iterator[tuple[int, str, Line]]:
        """Every line that is not empty."""
        for rank, lines in enumerate(self._lines):
            for tenant, line in lines.items():
                yield rank, tenant, line

    def check(self) -> None:
        """Every entry is in its line, and sums are exact."""
        found = 0
        for rank, lines in enumerate(self._lines):
            for tenant, line in lines.items():
                line.check()
                assert len(line), "an empty line stays"
                found += len(line)
                for entry in line.entries:
                    assert (entry.rank, entry.request.tenant) == (rank, tenant), "wrong line"
                    assert self._entries[entry.request.request_id] is entry, "two views"
            assert self.requests_by_tier[rank] == sum(map(len, lines.values())), "tier's requests"
            assert self.tokens_by_tier[rank] == sum(line.tokens for line in lines.values()), (
                "tier's tokens"
            )
        assert found == len(self._entries), "an entry without a line"
