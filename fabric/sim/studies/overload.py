"""Study 4: one to five times what the fleet can do. What do tiers and preemption keep for whom?

On a card with little room beside the weights: blocks run out before places or time do, so who comes
in must take them from somebody. Prompts are no longer than what the card computes within the first
tier's target.
"""

from __future__ import annotations

from dataclasses import replace

from fabric.core.configs import AdmissionConfig
from fabric.core.request import Request
from fabric.core.tiers import BUILT_IN
from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import profile
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.simulation import Plan
from fabric.sim.studies.study import Recorded, served
from fabric.sim.summary import attained
from fabric.workload import Arrivals, Lengths, TierShare, Workload, generate

PROFILE = profile("RTX4090:llama-8b")
SHAPE = Workload(
    name="overload",
    prompt=Lengths(median=512, sigma=0.8, low=32, high=1500),
    output=Lengths(median=256, sigma=0.8, low=8, high=1024),
    tiers=(
        TierShare(tier="interactive", weight=0.15),
        TierShare(tier="standard", weight=0.35),
        TierShare(tier="batch", weight=0.5),
    ),
)
SECONDS = 60
TIMES = (1.0, 2.0, 3.0, 5.0)
GOOD = 0.95


def run(seed: str, trace: Recorded | None) -> Result:  # noqa: ARG001
    """The same load by tiers and as one tier, at every multiple of the capacity."""
    capacity = _capacity(seed)
    columns = "load | how | interactive | standard | batch | within targets/s | refused | preempted"
    rows = [head(columns)]
    kept, good = [], []
    for times in TIMES:
        requests = _requests(seed, times * capacity)
        by_tier = _row("by tiers", times, requests, requests)
        plain = [replace(one, tier="standard") for one in requests]
        one_tier = _row("one tier", times, plain, requests)
        rows += [by_tier[0], one_tier[0]]
        kept.append(by_tier[1])
        good.append((by_tier[2], one_tier[2]))
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="interactive attains 95 % at every overload",
                found=", ".join(f"{one:.1%}" for one in kept),
                met=min(kept) >= GOOD,
            ),
            Target(
                text="more requests within their targets than as one tier, at every overload",
                found=", ".join(f"{a:.2f} against {b:.2f}/s" for a, b in good[1:]),
                met=all(a > b for a, b in good[1:]),
            ),
        ),
    )


def _row(
    how: str, times: float, requests: list[Request], asked: list[Request]
) -> tuple[tuple[str, ...], float, float]:
    """Judged by the tiers that were asked for, however the requests were served."""
    outcome, summary = served(Plan(profile=PROFILE, lean=True, admission=_queue()), requests)
    tiers = {tier.name: tier for tier in BUILT_IN}
    wished = {one.request_id: tiers[one.tier] for one in asked}
    shares, met = [], 0
    for tier in BUILT_IN:
        mine = [one for one in outcome.timelines if wished[one.request.request_id] is tier]
        count = sum(attained(one, tier) for one in mine)
        met += count
        shares.append(count / max(len(mine), 1))
    goodput = met / (outcome.ended / NS_PER_S)
    refused = sum(summary.refusals.values())
    preempted = sum(one.preempted for one in summary.tiers)
    percent = [f"{one:.1%}" for one in shares]
    return row(f"{times:.0f} ×", how, *percent, goodput, refused, preempted), shares[0], goodput


def _queue() -> AdmissionConfig:
    return AdmissionConfig(queue_ttl_s=60.0)


def _requests(seed: str, rate: float) -> list[Request]:
    arrivals = Arrivals(rate_per_s=rate)
    return list(generate(SHAPE, count=round(rate * SECONDS), seed=seed, arrivals=arrivals))


def _capacity(seed: str) -> float:
    """Requests a second of one replica that never waits for work."""
    roomy = AdmissionConfig(max_queued_requests=10**6, max_queued_tokens=10**9, queue_ttl_s=1e6)
    requests = [replace(one, tier="batch") for one in _requests(f"{seed}/capacity", 10.0)]
    outcome, _ = served(Plan(profile=PROFILE, lean=True, admission=roomy), requests)
    middle = [one.last for one in outcome.timelines if one.last is not None]
    middle.sort()
    low, high = len(middle) // 10, len(middle) * 6 // 10  # neither the begin nor the emptying end
    return (high - low) * NS_PER_S / (middle[high] - middle[low])
