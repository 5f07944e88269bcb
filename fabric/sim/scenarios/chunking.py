"""Long prompts beside short answers: does a prompt's chunk make its neighbours late?

One engine, answers of a few tokens, and now and then a prompt that takes seconds. With steps cut by
the targets of those who decode, and with steps that are only bounded in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fabric.core.configs import EngineConfig
from fabric.core.request import Request
from fabric.core.tiers import BUILT_IN
from fabric.sim.clock import NS_PER_MS, NS_PER_S
from fabric.sim.costs import DEMO_CPU
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import Arrivals, Lengths, TierShare, Workload, generate

SECONDS = 150
READERS = Workload(
    name="readers",
    prompt=Lengths(median=32, sigma=0.5, low=8, high=128),
    output=Lengths(median=24, sigma=0.5, low=8, high=64),
    tiers=(TierShare(tier="interactive", weight=1.0), TierShare(tier="standard", weight=1.0)),
)
READERS_PER_S = 1.0
LONG = Workload(
    name="long",
    prompt=Lengths(median=1024, sigma=0.3, low=512, high=2048),
    output=Lengths(median=8),
)
LONG_PER_S = 0.06
LEAST_THROUGHPUT = 0.9
TARGETS_MS: Mapping[str, int] = {tier.name: tier.tpot_ms for tier in BUILT_IN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """`late`: how many of the answers had a mean time per token above their tier's target, and the
    worst of these means as a part of the target; seconds until all had ended."""

    answers: int
    late: int
    worst: float
    long_ttft_s: float
    seconds: float


def serve(requests: Iterable[Request], engine: EngineConfig) -> Run:
    """This trace on one engine."""
    trace = sorted(requests, key=lambda one: one.arrival)
    outcome = Simulation(Plan(profile=replace(DEMO_CPU, engine=engine)), trace).run()
    shares, waits_ns = [], []
    for one in outcome.timelines:
        if "/long/" in one.request.request_id:
            waits_ns.append(one.ttft_ns or 0)
        elif one.tpot_ns is not None:
            shares.append(one.tpot_ns / NS_PER_MS / TARGETS_MS[one.request.tier])
    return Run(
        answers=len(shares),
        late=sum(share > 1 for share in shares),
        worst=max(shares),
        long_ttft_s=max(waits_ns) / NS_PER_S,
        seconds=outcome.ended / NS_PER_S,
    )


def long_prompts(seed: str) -> Result:
    """Budgets by targets, and a constant one."""
    trace = [
        one
        for shape, rate in ((READERS, READERS_PER_S), (LONG, LONG_PER_S))
        for one in generate(
            shape,
            count=round(rate * SECONDS),
            seed=seed,
            arrivals=Arrivals(rate_per_s=rate),
        )
    ]
    engine = DEMO_CPU.engine
    loose = tuple(replace(tier, ttft_ms=10**7, tpot_ms=10**7) for tier in BUILT_IN)
    cut, constant = serve(trace, engine), serve(trace, replace(engine, tiers=loose))
    rows = [head("steps | answers | late | worst of target | TTFT of long ones, worst s | seconds")]
    for name, one in (("by targets", cut), ("by tokens", constant)):
        rows.append(row(name, one.answers, one.late, one.worst, one.long_ttft_s, one.seconds))
    pace = constant.seconds / cut.seconds
    targets = (
        Target(
            text="no answer's mean time per token is above its tier's target",
            found=f"{cut.late} of {cut.answers}, the worst at {cut.worst:.0%} of it",
            met=cut.late == 0,
        ),
        Target(
            text="where a step is only bounded in tokens, some are",
            found=f"{constant.late} of {constant.answers}, the worst at {constant.worst:.0%}",
            met=constant.late > 0,
        ),
        Target(
            text="throughput is at least nine tenths of that",
            found=f"{pace:.1%}",
            met=pace >= LEAST_THROUGHPUT,
        ),
    )
    return Result(rows=tuple(rows), targets=targets)


SCENARIOS = (
    Scenario(
        name="long-prompts",
        text="long prompts beside answers: nobody's tokens come late",
        run=long_prompts,
    ),
)
