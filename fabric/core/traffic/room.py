"""Room in the queue and places to run: what each tier keeps of them from those below it.

A tier's `reserved_share` is kept from all tiers below; what it does not keep, they share. Where a
request finds no room in the queue, cheaper ones leave it, the newest first, or it is turned away.
But no tier loses what it has of the queue by its weight: so it always has something to send, and
with that its weighted part of all service, however many come of better tiers. Nobody starves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fabric.core.configs import AdmissionConfig
from fabric.core.traffic.lines import Entry, Lines


class Room:
    """Asks and answers only: what waits is in `Lines`, what runs is counted by `Admission`."""

    def __init__(self, config: AdmissionConfig) -> None:
        self.config = config
        weights = sum(tier.weight for tier in config.tiers)
        self._parts = [tier.weight / weights for tier in config.tiers]

    def leave_for(self, entry: Entry, lines: Lines) -> list[Entry] | str:
        """Who has to leave the queue for it (often nobody), or why there is no room."""
        requests, tokens = lines.of_tenant(entry.request.tenant)
        share = self.config.tenant_share
        if requests and share < 1.0 and not self._fits(requests, tokens, entry, share):
            return f"{requests} requests of this tenant are queued"
        leave: list[Entry] = []
        cheaper = self._cheaper(entry.rank, lines)
        while not self._has_room(entry, lines, leave):
            victim = next(cheaper, None)
            if victim is None:
                return f"{len(lines)} requests with {lines.tokens} tokens are queued"
            leave.append(victim)
        return leave

    def _cheaper(self, rank: int, lines: Lines) -> Iterator[Entry]:
        """Who may have to leave for this tier, in that order."""
        requests, tokens = list(lines.requests_by_tier), list(lines.tokens_by_tier)
        for one in lines.below(rank):
            part = self._parts[one.rank]
            over = requests[one.rank] > part * self.config.max_queued_requests
            over = over or tokens[one.rank] > part * self.config.max_queued_tokens
            if over and not one.again:
                requests[one.rank] -= 1
                tokens[one.rank] -= one.tokens
                yield one

    def has_place(self, rank: int, running: Sequence[int], places: float) -> bool:
        """May one more of this tier run, beside so many sequences of each? `places` 0: any."""
        if not places:
            return True
        kept = 0.0
        for above in range(rank):
            kept += self.config.tiers[above].reserved_share
            used = sum(running[above + 1 :])
            if kept and used and used + 1 > (1.0 - kept) * places:
                return False
        return True

    def _has_room(self, entry: Entry, lines: Lines, leave: list[Entry]) -> bool:
        """Once these are gone: in the queue, and beside what more important tiers keep of it."""
        gone = sum(victim.tokens for victim in leave)
        requests, tokens = len(lines) - len(leave), lines.tokens - gone
        if not requests:
            return True
        if not self._fits(requests, tokens, entry, 1.0):
            return False
        kept = 0.0
        for above in range(entry.rank):
            kept += self.config.tiers[above].reserved_share
            low = sum(lines.requests_by_tier[above + 1 :]) - len(leave)
            low_tokens = sum(lines.tokens_by_tier[above + 1 :]) - gone
            if kept and low and not self._fits(low, low_tokens, entry, 1.0 - kept):
                return False
        return True

    def _fits(self, requests: int, tokens: int, entry: Entry, share: float) -> bool:
        """One more beside these, in this part of the queue (of one request at least)."""
        most = max(1.0, share * self.config.max_queued_requests)
        return requests + 1 <= most and tokens + entry.tokens <= (
            share * self.config.max_queued_tokens
        )
