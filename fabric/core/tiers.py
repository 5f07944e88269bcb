"""SLO tiers: what a request of each kind is promised, and what is held back for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """One tier. `ttft_ms` and `tpot_ms` are targets: time to first token, time per output token.

    `weight`: its share of service under contention, relative to other tiers. `reserved_share`: the
    part of capacity (0 to 1) that lower tiers may not use up. `deadline_ms`: of a request that
    names none (None: none).
    """

    name: str
    ttft_ms: int
    tpot_ms: int
    weight: float = 1.0
    reserved_share: float = 0.0
    deadline_ms: int | None = None


# The most important first: position is rank.
BUILT_IN = (
    Tier(name="interactive", ttft_ms=500, tpot_ms=100, weight=4.0, reserved_share=0.1),
    Tier(name="standard", ttft_ms=2_000, tpot_ms=200, weight=2.0),
    Tier(name="batch", ttft_ms=60_000, tpot_ms=2_000, weight=1.0),
)
