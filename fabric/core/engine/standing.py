"""How important a request is to the engine: its class, the instant its first token is due.

    class   (priority, rank of the tier it is served as): a better class runs first and may preempt
            a worse one
    due     arrival + the tier's TTFT target, or the request's own deadline if that is earlier

Within a class the order is that of the due instants: earliest deadline first, which meets all
targets on one resource if any order can (Liu and Layland, 1973). All slacks (due - now) shrink at
the same pace, so this order never changes while requests wait, and the key can be a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.request import Request
from fabric.core.tiers import Tier

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """`due`, `preempts_from`: ns. `tpot_ns`: what its tier promises for each output token.

    `preempts_from`: from then on it may take the place of a worse tier of equal priority. The first
    tier may at once; others when half of their time is gone: until then a place that becomes free
    by itself costs nobody a swap.
    """

    priority: int
    rank: int
    due: int
    preempts_from: int
    tpot_ns: int

    @property
    def of_class(self) -> tuple[int, int]:
        """(priority, rank)."""
        return self.priority, self.rank


class Standings:
    """Places requests among the tiers of a config; a tier of another name comes last."""

    def __init__(self, tiers: tuple[Tier, ...]) -> None:
        if not tiers:
            raise ValueError("there must be at least one tier")
        self._tiers = tiers
        self._ranks = {tier.name: rank for rank, tier in enumerate(tiers)}

    def of(self, request: Request) -> Standing:
        """The standing of a request that arrives."""
        own = self._rank(request.tier)
        rank = own if request.served_as is None else self._rank(request.served_as)
        due = request.arrival + self._tiers[rank].ttft_ms * NS_PER_MS
        if request.deadline is not None:
            due = min(due, request.deadline)
        half = (due - request.arrival) // 2
        return Standing(
            rank=rank,
            priority=request.priority,
            due=due,
            preempts_from=due - half if rank else request.arrival,
            tpot_ns=self._tiers[own].tpot_ms * NS_PER_MS,
        )

    def _rank(self, tier: str) -> int:
        return self._ranks.get(tier, len(self._tiers) - 1)
