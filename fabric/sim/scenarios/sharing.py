"""Who shares the fleet, and the bounds that are proved for it: tenants, limits, waits of tiers.

fair-shares     `fair`, `service`: two backlogged tenants are never further apart than a bound
leases          `control.leases`: limits hold in sum over three dispatchers, one of which dies
bounded-waits   `lines`: nobody who is let in waits longer than a bound, whatever its tier
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf
from random import Random
from types import MappingProxyType

from fabric.core.configs import AdmissionConfig
from fabric.core.control.leases import TTL_NS, LeaseSplit
from fabric.core.lease import Demand
from fabric.core.request import Request, SamplingParams
from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN
from fabric.core.traffic.admission import Admission, Admitted, cost
from fabric.core.traffic.lines import PRIORITIES
from fabric.core.traffic.service import PASSED
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.records import Timeline
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import Arrivals, Lengths, TierShare, Workload, generate

WEIGHTS: Mapping[str, float] = MappingProxyType({"one": 1.0, "two": 2.0, "four": 4.0})
EACH = 600
SETTLED_NS = 20 * NS_PER_S  # from here on the length of outputs is known, and so what they cost
# Prompts of one tenant begin alike, so its requests wait for replicas that hold the prefix.
SHAPE = Workload(
    name="sharing",
    prompt=Lengths(median=48, sigma=0.8, low=8, high=384),
    output=Lengths(median=24, sigma=0.0, low=24, high=24),
    prefix=128,
)
ROOMY = AdmissionConfig(
    max_queued_requests=1_000_000, max_queued_tokens=1_000_000_000, queue_ttl_s=1e6
)


def fair_shares(seed: str) -> Result:
    """All want more than there is, from the begin."""
    tenants = tuple(Tenant(name=name, weight=weight) for name, weight in WEIGHTS.items())
    requests = [
        replace(one, tenant=name, request_id=f"{name}/{one.request_id}")
        for name in WEIGHTS
        for one in generate(
            SHAPE, count=EACH, seed=f"{seed}/{name}", arrivals=Arrivals(rate_per_s=1_000.0)
        )
    ]
    plan = Plan(replicas=4, admission=replace(ROOMY, tenants=tenants))
    arrivals: list[Request] = sorted(requests, key=lambda one: one.arrival)
    outcome = Simulation(plan, arrivals).run()
    largest = max(_cost(one) for one in outcome.timelines)
    until = min(_last_routed(outcome.timelines, name) for name in WEIGHTS)
    apart, served = _apart(outcome.timelines, until)
    rows = [head("tenants | served | furthest apart | bound")]
    worst = 0.0
    for one, other in combinations(WEIGHTS, 2):
        bound = largest / WEIGHTS[one] + largest / WEIGHTS[other] + PASSED
        found = apart[one, other]
        worst = max(worst, found / bound)
        share = f"{served[one]:,.0f}, {served[other]:,.0f}"
        rows.append(row(f"{one}, {other}", share, found, bound))
    weights = sum(WEIGHTS.values())
    total = sum(served.values())
    off = max(abs(served[name] / total * weights / WEIGHTS[name] - 1) for name in WEIGHTS)
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="no two backlogged tenants are further apart than U/w + U/w' + PASSED",
                found=f"at most {worst:.1%} of the bound",
                met=worst <= 1,
            ),
            Target(
                text="over the whole run each tenant's service is its weighted share within 5 %",
                found=f"{off:.1%}",
                met=off <= 0.05,
            ),
        ),
    )


def _apart(
    timelines: Iterable[Timeline], until: int
) -> tuple[dict[tuple[str, str], float], dict[str, float]]:
    """Service over weight: how far any two got apart in any interval, and service by tenant."""
    pairs = list(combinations(WEIGHTS, 2))
    served = dict.fromkeys(WEIGHTS, 0.0)
    low, high = dict.fromkeys(pairs, 0.0), dict.fromkeys(pairs, 0.0)
    for one in sorted(timelines, key=lambda one: one.routed or 0):
        if not SETTLED_NS <= (one.routed or 0) <= until:
            continue
        served[one.request.tenant] += _cost(one)
        for pair in pairs:
            gap = served[pair[0]] / WEIGHTS[pair[0]] - served[pair[1]] / WEIGHTS[pair[1]]
            low[pair], high[pair] = min(low[pair], gap), max(high[pair], gap)
    return {pair: high[pair] - low[pair] for pair in pairs}, served


def _cost(one: Timeline) -> int:
    return cost(one.prompt_tokens, one.request.sampling.max_tokens)


def _last_routed(timelines: Iterable[Timeline], tenant: str) -> int:
    return max(one.routed or 0 for one in timelines if one.request.tenant == tenant)


AT_ONCE, A_MINUTE = 6, 240
TICK_NS = 100 * NS_PER_MS
SECONDS, DIES_AT_S = 60, 20
LIMITED = (
    Tenant(name="few", max_concurrent=AT_ONCE),
    Tenant(name="slow", requests_per_minute=A_MINUTE),
)


@dataclass(slots=True, kw_only=True)
class _Front:
    """A dispatcher's queue, what of it runs, and when the control plane heard of it."""

    admission: Admission
    running: list[Request]
    heard: int = 0
    dead: bool = False


class _Fronts:
    """Three queues and the split of leases; a fifth of all words is lost, each way."""

    def __init__(self, seed: str) -> None:
        self.random = Random(f"leases/{seed}")
        config = replace(ROOMY, max_queued_requests=64, tenant_share=0.5, tenants=LIMITED)
        self.fronts = [
            _Front(admission=Admission(config, dispatchers=3), running=[]) for _ in "abc"
        ]
        self.split = LeaseSplit(config.tiers, LIMITED)
        self.let_in: list[int] = []
        self.most_at_once = 0
        self.at_once: dict[int, int] = {}
        self.number = 0

    def run(self) -> None:
        """A tick is a tenth of a second."""
        for now in range(0, SECONDS * NS_PER_S, TICK_NS):
            for index, front in enumerate(self.fronts):
                if front.dead and now - front.heard >= TTL_NS:
                    front.running.clear()  # the replicas have given it up
                front.dead = front.dead or (index == 2 and now >= DIES_AT_S * NS_PER_S)
                if not front.dead:
                    self._work(front, now)
            if now % NS_PER_S == 0:
                self._sync(now)
            few = sum(one.tenant == "few" for front in self.fronts for one in front.running)
            self.most_at_once = max(self.most_at_once, few)
            self.at_once[now] = few

    def _work(self, front: _Front, now: int) -> None:
        for one in [one for one in front.running if self.random.random() < 0.2]:
            front.running.remove(one)
            front.admission.completed(one, now, tokens=4, finished=True)
        for tenant in LIMITED:
            self.number += 1
            request = Request(
                request_id=f"r{self.number}",
                prompt=(1,) * 10,
                sampling=SamplingParams(max_tokens=4),
                arrival=now,
                tenant=tenant.name,
            )
            admitted = isinstance(front.admission.offer(request, now), Admitted)
            if admitted and tenant.name == "slow":
                self.let_in.append(now)
        while heads := front.admission.heads(now):
            front.running.append(front.admission.take(heads[0].request_id, now))

    def _sync(self, now: int) -> None:
        demands: list[Demand] = []
        for index, front in enumerate(self.fronts):
            if not front.dead and (not now or self.random.random() < 0.8):
                front.heard = now
                demands.append(front.admission.demand(f"d{index}", now))
        leases = self.split.split(demands, now)
        self.split.check()
        for lease in leases:
            if not now or self.random.random() < 0.8:
                self.fronts[int(lease.dispatcher_id[1])].admission.renew(lease, now)


def leases(seed: str) -> Result:
    """Every dispatcher is asked for more than the tenants' whole limits."""
    world = _Fronts(seed)
    world.run()
    rows = [head("seconds | dispatchers | slow: let in a minute | few: at once, mean")]
    rates: dict[int, float] = {}
    for begin in range(0, SECONDS, 10):
        span = range(begin * NS_PER_S, (begin + 10) * NS_PER_S)
        rates[begin] = 6.0 * sum(when in span for when in world.let_in)
        at_once = [count for when, count in world.at_once.items() if when in span]
        alive = 3 if begin < DIES_AT_S else 2
        mean = sum(at_once) / len(at_once)
        rows.append(row(f"{begin} to {begin + 10}", alive, rates[begin], mean))
    burst = max(
        len([when for when in world.let_in[index:] if when - since < 60 * NS_PER_S])
        for index, since in enumerate(world.let_in)
    )
    # A meter begins with ten seconds' worth.
    allowed = A_MINUTE + A_MINUTE / 6
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text=f"never more than {AT_ONCE} of the one tenant run at once",
                found=f"{world.most_at_once}",
                met=0 < world.most_at_once <= AT_ONCE,
            ),
            Target(
                text=f"in no minute are more than {allowed:.0f} of the other one let in",
                found=f"{burst}",
                met=0 < burst <= allowed,
            ),
            Target(
                text="the dead one's part comes back: nine tenths of the limit in the last third",
                found=f"{(rates[40] + rates[50]) / 2:.0f} of {A_MINUTE} a minute",
                met=(rates[40] + rates[50]) / 2 >= 0.9 * A_MINUTE,
            ),
        ),
    )


QUEUE = 64
MIXED = replace(
    SHAPE,
    name="waits",
    prefix=0,
    tiers=tuple(
        TierShare(tier=tier.name, weight=weight)
        for tier, weight in zip(BUILT_IN, (0.2, 0.3, 0.5), strict=True)
    ),
)


def bounded_waits(seed: str) -> Result:
    """One replica and far more than it can do, half of it batch; a short queue.

    What better tiers ask for would be enough to keep batch out of the queue for good: each tier
    keeps its part of the queue, and so gets its part of the service, by weight (`room`)."""
    admission = replace(ROOMY, max_queued_requests=QUEUE)
    arrivals = Arrivals(rate_per_s=10.0)
    requests = generate(MIXED, count=800, seed=seed, arrivals=arrivals)
    outcome = Simulation(Plan(admission=admission), requests).run()
    served = [one for one in outcome.timelines if one.finish is not None]
    largest = max(_cost(one) for one in outcome.timelines)
    speed = sum(_cost(one) for one in served) * NS_PER_S / outcome.ended
    weights = sum(tier.weight for tier in BUILT_IN)
    rows = [head("tier | let in | of | longest wait s | bound s | of the service")]
    worst, least = 0.0, inf
    total = sum(_cost(one) for one in served)
    for tier in BUILT_IN:
        mine = [one for one in outcome.timelines if one.request.tier == tier.name]
        waits = [(one.queued_ns or 0) / NS_PER_S for one in mine if one.finish is not None]
        overtaken_s = (1 + 2 * PRIORITIES) * tier.ttft_ms / 1_000
        ahead = (QUEUE + 2) * largest
        bound_s = overtaken_s + ahead * weights / (tier.weight * speed)
        longest_s = max(waits, default=bound_s * 2)  # a tier of which nobody is served has no bound
        worst = max(worst, longest_s / bound_s)
        got = sum(_cost(one) for one in mine if one.finish is not None) / total
        asked = sum(_cost(one) for one in mine) / total
        least = min(least, got / min(tier.weight / weights, asked))
        rows.append(row(tier.name, len(waits), len(mine), longest_s, bound_s, f"{got:.1%}"))
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="nobody who is served waited longer than the bound, in any tier",
                found=f"at most {worst:.1%} of the bound",
                met=worst <= 1,
            ),
            Target(
                text="each tier gets nine tenths of its part of the service by weight, or of what "
                "it asked for",
                found=f"at least {least:.1%}",
                met=least >= 0.9,
            ),
        ),
    )


SCENARIOS = (
    Scenario(
        name="fair-shares",
        text="three backlogged tenants, requests that wait for prefixes: how far apart",
        run=fair_shares,
    ),
    Scenario(
        name="leases",
        text="limits over three dispatchers, one of which dies; words get lost",
        run=leases,
    ),
    Scenario(
        name="bounded-waits",
        text="far too much, of every tier: how long those wait who are let in",
        run=bounded_waits,
    ),
)
