"""Storms and calms: whatever breaks, nothing is lost, nothing is doubled, nothing leaks.

Replicas die and stumble, links are slow or cut, news is old, and in the middle of it a burst comes.
`fabric simulate storms --seed S` runs those of a seed; what ever failed stands in
tests/data/storm_seeds.txt and is run by the tests for good.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from random import Random

from fabric.core.configs import AutoscalerConfig, EngineConfig
from fabric.core.request import Request
from fabric.sim.checks import Trial, trial
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import MeasuredCosts, Profile
from fabric.sim.faults import storm
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan
from fabric.workload import Arrivals, Lengths, TierShare, Workload, generate

# 10 ms a step and 0.1 ms a token; blocks for about six of these requests, so there is pressure too.
SMALL = Profile(
    name="small",
    costs=MeasuredCosts(
        table=((0, 10 * NS_PER_MS), (1000, 110 * NS_PER_MS)),
        ns_per_context=0.0,
        ns_per_pair=0.0,
        ns_per_row=0,
        ns_per_copy=0,
    ),
    engine=EngineConfig(
        num_blocks=48,
        num_host_blocks=16,
        max_sequences=8,
        step_tokens=64,
        chunk_tokens=64,
        context_limit=512,
    ),
)
SHAPE = Workload(
    name="storm",
    prompt=Lengths(median=48, sigma=0.6, low=8, high=160),
    output=Lengths(median=24, sigma=0.6, low=2, high=80),
    prefix=16,
    prefix_groups=3,
    tiers=(
        TierShare(tier="interactive", weight=0.3),
        TierShare(tier="standard", weight=0.4),
        TierShare(tier="batch", weight=0.3),
    ),
)
STORMS = 6
REQUESTS, BURST, FAULTS = 120, 40, 10
STORM_NS = 12 * NS_PER_S


def weather(seed: str) -> Trial:
    """One storm and its calm; every second one with an autoscaler."""
    random = Random(f"storms/{seed}")
    plan = Plan(
        profile=SMALL,
        replicas=3,
        dispatchers=2,
        check_every=500,
        cold_start_ns=2 * NS_PER_S,
        autoscaler=AutoscalerConfig(min_replicas=1, max_replicas=5)
        if random.random() < 0.5
        else None,
    )
    return trial(plan, _requests(seed, random), storm(seed, FAULTS, STORM_NS))


def _requests(seed: str, random: Random) -> list[Request]:
    """A steady load, a burst out of nothing, and some that want two answers."""
    base = generate(SHAPE, count=REQUESTS, seed=seed, arrivals=Arrivals(rate_per_s=10.0))
    begin = random.randrange(STORM_NS)
    burst = (
        replace(one, arrival=begin + one.arrival)
        for one in generate(
            SHAPE, count=BURST, seed=f"{seed}/burst", arrivals=Arrivals(rate_per_s=400.0)
        )
    )
    found = sorted(chain(base, burst), key=lambda one: (one.arrival, one.request_id))
    return [
        replace(one, sampling=replace(one.sampling, n=2)) if index % 9 == 0 else one
        for index, one in enumerate(found)
    ]


def storms(seed: str) -> Result:
    """As many as a commit can afford."""
    rows = [head("storm | requests | refused | lost a replica | resumed | findings")]
    findings, resumed, ended = [], 0, True
    for number in range(STORMS):
        name = f"{seed}/{number}"
        found = weather(name)
        lives = found.outcome.timelines
        refused = sum(one.refusal is not None for one in lives)
        hit = sum(one.losses > 0 for one in lives)
        rows.append(row(name, len(lives), refused, hit, found.resumed, len(found.findings)))
        findings += [f"{name}: {one.subject}: {one.what}" for one in found.findings]
        resumed += found.resumed
        ended = ended and found.ended
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text="every request ended, its tokens are right and told once, all blocks are free",
                found="; ".join(findings[:3]) or "no finding",
                met=ended and not findings,
            ),
            Target(
                text="requests did lose replicas and were answered all the same",
                found=f"{resumed} resumed",
                met=resumed > 0,
            ),
        ),
    )


SCENARIOS = (
    Scenario(name="storms", text="crashes, stragglers, cut links, old news, bursts", run=storms),
)
