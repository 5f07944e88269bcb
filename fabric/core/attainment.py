"""How well the targets are met: what the ledger tells dispatchers, autoscaler and people.

A request is met when it finished, its first token came within its tier's `ttft_ms`, its tokens
after that took `tpot_ms` on average or less, and it kept its deadline. What is turned away for want
of capacity is not met; what breaks its tenant's own limits does not count at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from fabric.core.tiers import Tier


class Dimension(StrEnum):
    """By what requests are counted; each counts once in every dimension."""

    TIER = "tier"
    TENANT = "tenant"
    VERSION = "version"
    ADAPTER = "adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request, once it is over. Times in seconds; None: it never came so far.

    `tokens`: all choices together. `refused`: turned away for want of capacity. `deadline_kept` is
    True where there was none.
    """

    tier: str
    tenant: str = ""
    version: str = ""
    adapter: str | None = None
    queue_wait_s: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    tokens: int = 0
    deadline_kept: bool = True
    refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Of the last ten minutes, seconds. `count` values were seen; without any, all are 0."""

    count: int = 0
    total: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The last `seconds`. `attainment`: the share that was met (1 without requests).

    `burn_rate`: the share that was missed over the share that may be missed; 1 uses up the error
    budget exactly, 10 ten times as fast (Google's SRE workbook, chapter 5).
    `goodput_per_s`: requests that met their targets; `good_tokens_per_s`: their tokens.
    """

    seconds: float
    requests: int = 0
    refused: int = 0
    met: int = 0
    attainment: float = 1.0
    burn_rate: float = 0.0
    goodput_per_s: float = 0.0
    good_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One tier, tenant, version or adapter."""

    dimension: Dimension
    name: str
    minute: Window
    ten_minutes: Window
    queue_wait: Quantiles
    ttft: Quantiles
    tpot: Quantiles
    e2e: Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSnapshot:
    """All series, tiers first, as of `taken` (ns). One a second."""

    taken: int
    series: tuple[Series, ...] = ()

    def tier(self, name: str) -> Series | None:
        """The series of a tier; None: it had no request in ten minutes."""
        for one in self.series:
            if one.dimension is Dimension.TIER and one.name == name:
                return one
        return None


# Of fewer requests a minute one missed target would be a fire.
LEAST_REQUESTS = 10


def worst_burn(snapshot: SloSnapshot) -> tuple[float, float]:
    """Burn rates over one and ten minutes of the tier that is worst off; tiers with few requests
    in the last minute don't count."""
    worst = (0.0, 0.0)
    for one in snapshot.series:
        if one.dimension is Dimension.TIER and one.minute.requests >= LEAST_REQUESTS:
            worst = max(worst, (one.minute.burn_rate, one.ten_minutes.burn_rate))
    return worst


def burn_by_part(
    snapshot: SloSnapshot, tiers: Sequence[Tier]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """`worst_burn` by who could help: first tokens that come late (and requests turned away), and
    tokens after that. A tier that misses by neither's 99th percentile counts for both."""
    targets = {tier.name: tier for tier in tiers}
    first, later = (0.0, 0.0), (0.0, 0.0)
    for one in snapshot.series:
        if one.dimension is not Dimension.TIER or one.minute.requests < LEAST_REQUESTS:
            continue
        tier = targets[one.name]
        burn = (one.minute.burn_rate, one.ten_minutes.burn_rate)
        late = one.minute.refused > 0 or one.ttft.p99 * 1_000 > tier.ttft_ms
        slow = one.tpot.p99 * 1_000 > tier.tpot_ms
        if late or not slow:
            first = max(first, burn)
        if slow or not late:
            later = max(later, burn)
    return first, later
