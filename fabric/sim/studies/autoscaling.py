"""Study 3: the autoscaler against as many as the peak needs, and against one that knows the trace.

The oracle knows every arrival and what a replica can do. Of its schedules (so many tokens a second
a replica, ordered a cold start ahead) it takes the cheapest that attains what is asked for. Cold
starts take 30 s for everybody, and all begin with the replicas that the oracle begins with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, pi, sin
from random import Random

from fabric.core.configs import AdmissionConfig, AutoscalerConfig, ForecastConfig
from fabric.core.request import Request
from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import profile
from fabric.sim.scenarios.result import Result, Target, head, row
from fabric.sim.simulation import FAST_NEWS_NS, Plan, Simulation
from fabric.sim.studies.study import Recorded, served
from fabric.sim.summary import Summary, summarize
from fabric.workload import Arrivals, Lengths, Workload, generate

PROFILE = profile("RTX4090:llama-8b")
COLD_START_S = 30
MOST = 24
GOOD = 0.99
DEARER = 1.25
SLOT_S = 10
# What a replica is taken to do in the oracle's schedules, of what it can do at most.
FULLNESS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
DAYS, DAY_S = 7, 900
SHAPE = Workload(
    name="days",
    prompt=Lengths(median=512, sigma=0.6, low=32, high=2048),
    output=Lengths(median=12, sigma=0.5, low=2, high=48),
)
ROOMY = AdmissionConfig(max_queued_requests=10**6, max_queued_tokens=10**9, queue_ttl_s=1e6)
Load = Callable[[], Iterable[Request]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """So many replicas from each slot on."""

    replicas: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most of them."""
        return max(self.replicas)


def run(seed: str, trace: Recorded | None) -> Result:
    """A recorded trace, or seven days of a quarter of an hour each."""
    if trace is not None:
        return _against(trace.requests, _config(86_400.0))
    return _against(lambda: week(seed), _config(float(DAY_S)))


def _config(period_s: float) -> AutoscalerConfig:
    forecast = ForecastConfig(period_s=period_s, slot_s=period_s / 96)
    return AutoscalerConfig(max_replicas=MOST, horizon_s=60.0, forecast=forecast)


def _against(load: Load, config: AutoscalerConfig) -> Result:
    each = _tokens_per_s(load)
    oracle, schedule = _oracle(load, each)
    peak = schedule.peak
    static = _fixed(load, peak)
    scaled = _serve(_plan(schedule.replicas[0], config), load)
    rows = [head("replicas by | attained | TTFT p50 ms | TTFT p99 ms | replica-hours | × oracle")]
    for name, one in (
        (f"a fixed number, {peak}", static),
        ("the autoscaler", scaled),
        ("one that knows the trace", oracle),
    ):
        tier = one.tiers[0]
        cost = one.replica_hours / oracle.replica_hours
        waits = (tier.ttft_ms.p50, tier.ttft_ms.p99)
        rows.append(row(name, f"{one.attained:.2%}", *waits, one.replica_hours, f"{cost:.2f}"))
    dearer = scaled.replica_hours / oracle.replica_hours
    return Result(
        rows=tuple(rows),
        targets=(
            Target(
                text=f"the autoscaler attains {GOOD:.0%}",
                found=f"{scaled.attained:.2%}",
                met=scaled.attained >= GOOD,
            ),
            Target(
                text=f"at no more than {DEARER} times the oracle's replica-hours",
                found=f"{dearer:.2f} times",
                met=dearer <= DEARER,
            ),
        ),
    )


def _oracle(load: Load, tokens_per_s: float) -> tuple[Summary, Schedule]:
    """The cheapest schedule that attains enough; the dearest one where none does."""
    work = _work(load)
    for share in FULLNESS:
        schedule = schedule_for(work, share * tokens_per_s)
        found = _follow(load, schedule)
        if found.attained >= GOOD:
            break
    return found, schedule


def _work(load: Load) -> list[int]:
    """Prompt tokens that arrive in each slot."""
    slots: list[int] = []
    for request in load():
        slot = request.arrival // (SLOT_S * NS_PER_S)
        slots += [0] * (slot + 1 - len(slots))
        slots[slot] += len(request.prompt)
    return slots


def schedule_for(work: Sequence[int], each: float) -> Schedule:
    """Enough for the fullest of three slots around each: work outlasts the slot it comes in."""
    needed = [max(1, ceil(tokens / SLOT_S / each)) for tokens in work]
    return Schedule(
        replicas=tuple(min(MOST, max(needed[max(0, i - 1) : i + 2])) for i in range(len(needed)))
    )


def _follow(load: Load, schedule: Schedule) -> Summary:
    simulation = Simulation(_plan(schedule.replicas[0], None), load())
    last = len(schedule.replicas) - 1

    def turn(now: int) -> None:
        seconds = now // NS_PER_S
        soon = range(seconds // SLOT_S, (seconds + COLD_START_S) // SLOT_S + 1)
        simulation.fleet.scale_to(max(schedule.replicas[min(i, last)] for i in soon))

    simulation.every(NS_PER_S, turn)
    outcome = simulation.run()
    return summarize(outcome, profile=PROFILE)


def _fixed(load: Load, replicas: int) -> Summary:
    return _serve(_plan(replicas, None), load)


def _serve(plan: Plan, load: Load) -> Summary:
    return served(plan, load())[1]


def _plan(replicas: int, config: AutoscalerConfig | None) -> Plan:
    return Plan(
        profile=PROFILE,
        replicas=replicas,
        autoscaler=config,
        cold_start_ns=COLD_START_S * NS_PER_S,
        lean=True,
        news_ns=FAST_NEWS_NS,
    )


def _tokens_per_s(load: Load) -> float:
    """Prompt tokens a second of a replica that is never without work, outputs done beside."""
    requests = [request for request, _ in zip(load(), range(400), strict=False)]
    plan = replace(_plan(1, None), admission=ROOMY)
    outcome, _ = served(plan, (replace(one, arrival=0) for one in requests))
    return sum(one.prompt_tokens for one in outcome.timelines) / (outcome.ended / NS_PER_S)


def week(seed: str) -> Iterator[Request]:
    """Seven days: nights, mornings, two days with less, and noise that changes every hour."""
    noise = Random(f"{seed}/noise")
    factors = [noise.lognormvariate(0.0, 0.15) for _ in range(DAYS * 24 + 1)]

    def rate(second: float) -> float:
        day = int(second // DAY_S)
        season = 1.0 - 0.85 * sin(2 * pi * second / DAY_S + pi / 2)
        weekend = 0.6 if day % 7 >= 5 else 1.0
        return 6.0 * season * weekend * factors[int(second // (DAY_S / 24))]

    clock_s, done = 0.0, 0.0
    for request in generate(SHAPE, count=1 << 30, seed=seed, arrivals=Arrivals(rate_per_s=1.0)):
        due = request.arrival / NS_PER_S
        while done < due:
            done += rate(clock_s) * 0.05
            clock_s += 0.05
            if clock_s > DAYS * DAY_S:
                return
        yield replace(request, arrival=round(clock_s * NS_PER_S))
