"""An outcome in figures: percentiles by tier, goodput, what the replicas cost."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fabric.core.request import Finish
from fabric.core.tiers import BUILT_IN, Tier
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import Profile
from fabric.sim.records import Outcome, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Percentiles in ms; NaN where nothing was measured."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSummary:
    """One tier. `attained`: share of all its requests that finished within both targets."""

    tier: str
    requests: int
    finished: int
    refused: int
    preempted: int
    attained: float
    queued_ms: Spread
    ttft_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A run. `replica_hours` are paid for, from the order to the removal.

    `attained`: share of all requests within their targets. `violations`: how many others, by what
    kept them from it. `dollars`: None where the profile has no price.
    """

    seconds: float
    requests: int
    attained: float
    tokens_per_s: float
    goodput_per_s: float
    replica_hours: float
    gpu_hours: float
    dollars: float | None
    replicas_peak: int
    refusals: dict[str, int]
    violations: dict[str, int]
    tiers: tuple[TierSummary, ...]

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def summarize(
    outcome: Outcome, tiers: Sequence[Tier] = BUILT_IN, profile: Profile | None = None
) -> Summary:
    """Figures of a whole run. `profile`: whose GPUs and price count; None: nobody's."""
    seconds = outcome.ended / NS_PER_S
    by_tier = {tier.name: tier for tier in tiers}
    causes = [violation(one, by_tier[one.request.tier]) for one in outcome.timelines]
    met = causes.count(None)
    replica_hours = outcome.replica_ns / NS_PER_S / 3600
    dollars = None if profile is None else profile.dollars_per_hour
    return Summary(
        seconds=seconds,
        requests=len(causes),
        attained=met / max(len(causes), 1),
        tokens_per_s=sum(one.tokens for one in outcome.timelines) / max(seconds, 1e-9),
        goodput_per_s=met / max(seconds, 1e-9),
        replica_hours=replica_hours,
        gpu_hours=replica_hours * (profile.gpus if profile else 0),
        dollars=None if dollars is None else dollars * replica_hours,
        replicas_peak=max((one.ready + one.draining for one in outcome.samples), default=0),
        refusals=dict(
            sorted(Counter(_kind(one.refusal) for one in outcome.timelines if one.refusal).items())
        ),
        violations=dict(sorted(Counter(one for one in causes if one is not None).items())),
        tiers=tuple(
            found for tier in tiers if (found := _of_tier(tier, outcome.timelines)).requests
        ),
    )


def attained(timeline: Timeline, tier: Tier) -> bool:
    """Finished, its first token and the pace of the others within the tier's targets."""
    return violation(timeline, tier) is None


def violation(timeline: Timeline, tier: Tier) -> str | None:
    """What kept it from its targets; None: they were met.

    TTFT is put down to waiting if it would have been met without, TPOT to preemption where there
    was one.
    """
    ttft, tpot = timeline.ttft_ns, timeline.tpot_ns
    if timeline.refusal is not None:
        return f"refused: {_kind(timeline.refusal)}"
    if timeline.finish not in (Finish.STOP, Finish.LENGTH) or ttft is None:
        return "not answered to the end"
    target = tier.ttft_ms * NS_PER_MS
    if ttft > target:
        waited = timeline.waited_ns or 0
        return "TTFT: waited for a place" if ttft - waited <= target else "TTFT: slow prompt"
    if (tpot or 0) > tier.tpot_ms * NS_PER_MS:
        return "TPOT: preempted" if timeline.preemptions else "TPOT: slow steps"
    deadline = timeline.request.deadline
    if deadline is not None and (timeline.last or 0) > deadline:
        return "deadline"
    return None


def _kind(reason: str) -> str:
    """A reason without its figures: those of one kind are counted together."""
    return re.sub(r"\d+", "N", reason)


def _of_tier(tier: Tier, timelines: Iterable[Timeline]) -> TierSummary:
    mine = [one for one in timelines if one.request.tier == tier.name]
    return TierSummary(
        tier=tier.name,
        requests=len(mine),
        finished=sum(one.finish is not None for one in mine),
        refused=sum(one.refusal is not None for one in mine),
        preempted=sum(one.preemptions > 0 for one in mine),
        attained=sum(attained(one, tier) for one in mine) / max(len(mine), 1),
        queued_ms=spread(one.queued_ns for one in mine),
        ttft_ms=spread(one.ttft_ns for one in mine),
        tpot_ms=spread(one.tpot_ns for one in mine),
        e2e_ms=spread(one.e2e_ns for one in mine),
    )


def spread(values_ns: Iterable[float | None]) -> Spread:
    """Percentiles of what was measured, ns in, ms out."""
    known = [value for value in values_ns if value is not None]
    if not known:
        return Spread(p50=float("nan"), p90=float("nan"), p99=float("nan"))
    p50, p90, p99 = np.percentile(np.array(known) / NS_PER_MS, [50, 90, 99])
    return Spread(p50=float(p50), p90=float(p90), p99=float(p99))
