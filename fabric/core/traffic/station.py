"""What a router knows of one replica: its last snapshot, and what went there since."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from fabric.core.configs import RouterConfig
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.outlook import PROMPT_PART, Outlook, Sent, outlook, pace_ns

NEVER = 1 << 62


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """A request waits for its turn here, since its `since`th look at a holder; it counts as `sent`
    for those that came later. `until`: its word holds so long, ns."""

    since: int
    until: int
    sent: Sent


class Station:
    """One replica, as one dispatcher sees it.

    Whether it has head-room is asked far more often than anything changes, so the answer is kept as
    the instant from which on it has some, until there is news.
    """

    __slots__ = ("_room_at", "config", "promised", "sent", "snapshot")

    def __init__(self, config: RouterConfig, snapshot: ReplicaSnapshot) -> None:
        self.config = config
        self.snapshot = snapshot
        self.sent: deque[Sent] = deque()
        self.promised: dict[str, Promise] = {}
        self._room_at: dict[int, int] = {}

    def see(self, snapshot: ReplicaSnapshot) -> None:
        """News: what was sent long enough before it is in it."""
        self.snapshot = snapshot
        sent, shown = self.sent, snapshot.taken - self.config.in_transit_ns
        while sent and sent[0].at < shown:
            sent.popleft()
        self._room_at.clear()

    def send(self, sent: Sent) -> None:
        """A request goes there."""
        self.sent.append(sent)
        self._room_at.clear()

    def has_room(self, rank: int, now: int) -> bool:
        """Little enough waits there to be computed before a request of this rank."""
        at = self._room_at.get(rank)
        if at is None:
            at = self._room_at[rank] = self._roomy_from(rank)
        return at <= now

    def seems_roomy(self, rank: int, now: int) -> bool:
        """As `has_room`, for who only looks: nothing is kept, so that a journal of what was decided
        tells the same state."""
        at = self._room_at.get(rank)
        return (self._roomy_from(rank) if at is None else at) <= now

    def outlook(self, rank: int, now: int, since: int | None = None) -> Outlook:
        """As a request of this rank would find it after all that have waited for it before `since`
        (None: nobody waits)."""
        unseen: list[Sent] | deque[Sent] = self.sent
        if since is not None and self.promised:
            for name in [one for one, was in self.promised.items() if was.until <= now]:
                del self.promised[name]
            before = [one.sent for one in self.promised.values() if one.since < since]
            unseen = [*self.sent, *before]
        return outlook(
            self.snapshot,
            unseen,
            rank=rank,
            now=now,
            block_size=self.config.block_size,
            chunk_tokens=self.config.chunk_tokens,
        )

    def _roomy_from(self, rank: int) -> int:
        """When what waits falls below both limits, by ageing alone (`outlook`). In whole ns."""
        config, seen = self.config, self.snapshot
        pace = pace_ns(seen, config.chunk_tokens)
        limit_ns = min(config.headroom_tokens * pace, config.headroom_ns)
        limit_ns -= sum(one.tokens for one in self.sent if one.rank <= rank) * pace
        by_tier = seen.waiting_tokens_by_tier
        ahead = sum(by_tier[: rank + 1]) if by_tier else seen.waiting_tokens
        if limit_ns <= 0:
            return NEVER
        if ahead * pace < limit_ns:
            return -NEVER
        if not seen.token_ns:
            return NEVER
        return seen.taken + int((ahead * pace - limit_ns) / PROMPT_PART) + 1
