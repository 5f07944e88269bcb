"""Interactive requests on an engine that batch work saturates: is it as if they were alone?

The load is three times what the engine can do, interactive at most 30 % of its capacity. The first
requests are left out: steps are cut short only once interactive requests have begun to come.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from fabric.core.configs import AdmissionConfig
from fabric.core.request import Request
from fabric.core.tiers import BUILT_IN
from fabric.sim.clock import NS_PER_MS
from fabric.sim.costs import DEMO_CPU
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import Arrivals, Workload, generate
from fabric.workload.tiers import BATCH, BATCH_SHARE, INTERACTIVE, INTERACTIVE_SHARE, Contest

COUNT = 80
LEFT_OUT = 5
PLACES = 16
# Nobody is turned away: what is measured is who waits.
ROOMY = AdmissionConfig(
    max_queued_requests=1_000_000,
    max_queued_tokens=1_000_000_000,
    queue_ttl_s=1e6,
    tiers=tuple(replace(tier, reserved_share=0.0) for tier in BUILT_IN),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """TTFT of the interactive ones, ms; tokens a second until all had ended; the 99th percentile of
    a step, ms; of tokens that preempted sequences had, how many were computed again."""

    ttft_ms: tuple[float, float]
    tokens_per_s: float
    step_ms: float
    preemptions: int
    preempted: int
    dropped: int


def serve(requests: Iterable[Request]) -> Run:
    """One engine with few places, and this trace."""
    engine = replace(DEMO_CPU.engine, max_sequences=PLACES)
    plan = Plan(profile=replace(DEMO_CPU, engine=engine), admission=ROOMY)
    trace: list[Request] = sorted(requests, key=lambda one: one.arrival)
    simulation = Simulation(plan, trace)
    outcome = simulation.run()
    mine = [one for one in outcome.timelines if one.request.request_id.find("/interactive/") > 0]
    waits = [one.ttft_ns / NS_PER_MS for one in mine[LEFT_OUT:] if one.ttft_ns is not None]
    (replica,) = simulation.fleet.replicas.values()
    steps = replica.worker.steps_by_ms
    seen = replica.engine.snapshot("", 0)
    p50, p99 = np.percentile(waits, [50, 99]) if waits else (0.0, 0.0)
    return Run(
        ttft_ms=(float(p50), float(p99)),
        tokens_per_s=sum(one.tokens for one in outcome.timelines) * 1e9 / outcome.ended,
        step_ms=float(np.percentile(np.repeat([*steps], [*steps.values()]), 99)),
        preemptions=seen.preemptions_total,
        preempted=seen.preempted_tokens_total,
        dropped=seen.dropped_tokens_total,
    )


def rate_of(shape: Workload, seed: str) -> float:
    """Requests a second of this shape alone that one engine can do."""
    requests = list(generate(shape, count=COUNT, seed=f"{seed}/capacity"))
    tokens = sum(one.sampling.max_tokens for one in requests)
    return COUNT * serve(requests).tokens_per_s / tokens


def saturated(seed: str) -> Result:
    """Alone, beside batch by tiers, and the same trace first come first served."""
    interactive_rate = INTERACTIVE_SHARE * rate_of(INTERACTIVE, seed)
    batch_rate = BATCH_SHARE * rate_of(BATCH, seed)
    interactive = list(
        generate(
            INTERACTIVE, count=COUNT, seed=seed, arrivals=Arrivals(rate_per_s=interactive_rate)
        )
    )
    count = round(interactive[-1].arrival / 1e9 * batch_rate)
    batch = list(generate(BATCH, count=count, seed=seed, arrivals=Arrivals(rate_per_s=batch_rate)))
    alone, tiers = serve(interactive), serve([*interactive, *batch])
    fifo = serve(replace(one, tier="standard") for one in [*interactive, *batch])
    # A step of the unloaded engine: beside batch alone, when none of these comes, steps are longer.
    contest = Contest(
        alone_ms=alone.ttft_ms[1],
        beside_ms=tiers.ttft_ms[1],
        step_ms=alone.step_ms,
        preempted=tiers.preempted,
        dropped=tiers.dropped,
        tokens_per_s=tiers.tokens_per_s,
        fifo_tokens_per_s=fifo.tokens_per_s,
    )
    rows = [head("run | TTFT p50 ms | TTFT p99 ms | tokens/s | step p99 ms | preemptions")]
    for name, one in (("alone", alone), ("by tiers", tiers), ("one tier", fifo)):
        rows.append(row(name, *one.ttft_ms, one.tokens_per_s, one.step_ms, one.preemptions))
    targets = tuple(
        Target(text=text, found=found, met=met) for text, found, met in contest.verdicts()
    )
    return Result(rows=tuple(rows), targets=targets)


SCENARIOS = (
    Scenario(
        name="preempting",
        text="interactive requests beside three times the batch work that fits",
        run=saturated,
    ),
)
