"""Sixty-four replicas and a heavy-tailed mix: does every replica have the same to do?

Two dispatchers, each with snapshots that are 20 ms old, arrivals in bursts. What prefix is where is
nowhere known at the beginning, so the first quarter of all requests is left out of the figures.

What is promised and how it is reckoned: `workload.evenness`. With as many requests as here and the
replicas' labels shuffled the slowest has 1.4 times the mean latency of the fastest, so no policy
could stay below 1.3 there; a token's latency is the target.
"""

from __future__ import annotations

from fabric.config.parts import HEADROOM_STEPS
from fabric.core.configs import AdmissionConfig, RouterConfig
from fabric.sim.clock import NS_PER_MS
from fabric.sim.costs import DEMO_CPU
from fabric.sim.dispatcher import Network
from fabric.sim.records import Outcome, Timeline
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.workload import read_mix
from fabric.workload.evenness import Evenness, Served, evenness, verdicts

REPLICAS = 64
REQUESTS = 32_000
RATE_PER_REPLICA = 1.8
LEFT_OUT = 0.25
ROOMY = AdmissionConfig(max_queued_requests=100_000, max_queued_tokens=10**9, queue_ttl_s=1e6)


def measure(policy: str, seed: str) -> Evenness:
    """One run of a policy."""
    requests = read_mix("heavy_tailed").generate(
        count=REQUESTS, seed=seed, rate_per_s=RATE_PER_REPLICA * REPLICAS
    )
    router = RouterConfig(
        policy=policy, headroom_tokens=HEADROOM_STEPS * DEMO_CPU.engine.step_tokens
    )
    plan = Plan(
        replicas=REPLICAS,
        dispatchers=2,
        admission=ROOMY,
        router=router,
        network=Network(snapshot_delay_ns=20 * NS_PER_MS),
    )
    outcome = Simulation(plan, requests).run()
    return seen(outcome, requests[-1].arrival)


def seen(outcome: Outcome, last_arrival: int) -> Evenness:
    """What a run says of its replicas; depth while requests arrive."""
    timelines = sorted(outcome.timelines, key=lambda one: one.request.arrival)
    timelines = timelines[int(LEFT_OUT * len(timelines)) :]
    depths: dict[str, list[float]] = {}
    for sample in outcome.samples:
        if timelines[0].request.arrival <= sample.at <= last_arrival:
            for one in sample.snapshots:
                open_requests = one.running + one.waiting + one.swapped
                depths.setdefault(one.replica_id, []).append(open_requests)
    return evenness([_served(one) for one in timelines], depths)


def _served(one: Timeline) -> Served:
    return Served(
        replica=one.replica or "",
        waited_ms=(one.waited_ns or 0) / NS_PER_MS,
        ttft_ms=(one.ttft_ns or 0) / NS_PER_MS,
        e2e_ms=(one.e2e_ns or 0) / NS_PER_MS,
        tokens=one.tokens,
        prompt_tokens=one.prompt_tokens,
        cached_tokens=one.cached_tokens,
    )


def heavy_tailed(seed: str) -> Result:
    """Our choice, round robin, and pure affinity."""
    rows = [
        head("policy | wait cv | depth cv | latency spread | of means | prefix hits | TTFT p99 ms")
    ]
    found = {}
    for policy in ("cost", "round_robin", "affinity"):
        one = found[policy] = measure(policy, seed)
        spreads = (one.latency, one.mean_latency)
        rows.append(row(policy, one.wait, one.depth, *spreads, one.hits, one.ttft_ms))
    targets = verdicts(found["cost"], found["round_robin"], found["affinity"])
    return Result(
        rows=tuple(rows),
        targets=tuple(Target(text=text, found=said, met=met) for text, said, met in targets),
    )


SCENARIOS = (
    Scenario(
        name="routing",
        text="64 replicas, a heavy-tailed mix: how even waits and queues are (minutes)",
        run=heavy_tailed,
        slow=True,
    ),
)
