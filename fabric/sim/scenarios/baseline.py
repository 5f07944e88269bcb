"""What must hold whatever is being studied: more hardware, shorter waits, nobody lost."""

from __future__ import annotations

from fabric.sim.costs import DEMO_CPU
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.sim.summary import summarize
from fabric.workload import Arrivals, Lengths, Workload, generate

SHAPE = Workload(name="baseline", prompt=Lengths(median=64), output=Lengths(median=32))


def more_replicas(seed: str) -> Result:
    """One load on one, two and four replicas: waits shrink, and nobody is lost."""
    rows = [head("replicas | finished | refused | TTFT p50 ms | TTFT p99 ms | queue p99 ms")]
    waits = []
    finished = []
    for replicas in (1, 2, 4):
        requests = generate(SHAPE, count=120, seed=seed, arrivals=Arrivals(rate_per_s=4.0))
        outcome = Simulation(Plan(profile=DEMO_CPU, replicas=replicas), requests).run()
        tier = summarize(outcome).tiers[0]
        rows.append(
            row(replicas, tier.finished, tier.refused, tier.ttft_ms.p50, tier.ttft_ms.p99,
                tier.queued_ms.p99)
        )  # fmt: skip
        waits.append(tier.ttft_ms.p99)
        finished.append(tier.finished)
    targets = (
        Target(text="every request is answered", found=str(finished), met=finished == [120] * 3),
        Target(
            text="TTFT p99 falls with every replica",
            found=f"{', '.join(f'{one:.0f}' for one in waits)} ms",
            met=waits == sorted(waits, reverse=True),
        ),
    )
    return Result(rows=tuple(rows), targets=targets)


SCENARIOS = (
    Scenario(name="more-replicas", text="one load on 1, 2 and 4 replicas", run=more_replicas),
)
