"""The autoscaler over real engines: it follows, it anticipates, it rests, and it sleeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import pi, sin

from fabric.core.configs import AutoscalerConfig, ForecastConfig
from fabric.core.request import Request
from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import DEMO_CPU
from fabric.sim.records import Outcome
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.sim.summary import Summary, spread, summarize
from fabric.workload import Arrivals, Lengths, Workload, generate

# About a third of a second of one CPU replica's time a request.
SHAPE = Workload(
    name="scaling",
    prompt=Lengths(median=80, sigma=0.4, low=16, high=300),
    output=Lengths(median=12, sigma=0.4, low=4, high=32),
)
CONFIG = AutoscalerConfig(min_replicas=1, max_replicas=12)
COLD_START_NS = 8 * NS_PER_S
Rate = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run and what it came to."""

    outcome: Outcome
    summary: Summary

    @property
    def changes(self) -> list[tuple[int, int]]:
        """(second, replicas wanted from then on)."""
        return [(one.at // NS_PER_S, one.value) for one in self.outcome.decisions]

    @property
    def lost(self) -> int:
        """Requests that were not answered to the end."""
        tier = self.summary.tiers[0]
        return tier.requests - tier.finished

    def cells(self, name: str) -> tuple[str, ...]:
        """A row of the table."""
        tier = self.summary.tiers[0]
        most = max((value for _, value in self.changes), default=0)
        return row(
            name, tier.requests, self.lost, len(self.changes), most, tier.ttft_ms.p50,
            tier.ttft_ms.p99, f"{tier.attained:.1%}", self.summary.replica_hours,
        )  # fmt: skip


HEAD = head(
    "run | requests | lost | changes | most | TTFT p50 ms | TTFT p99 ms | attained | replica-hours"
)


def run(rate: Rate, seconds: int, seed: str, config: AutoscalerConfig, *, rest_s: int = 0) -> Run:
    """Arrivals of this rate for so long, then nothing; `rate` in requests a second."""
    plan = Plan(
        profile=DEMO_CPU,
        replicas=max(1, config.min_replicas),
        autoscaler=config,
        cold_start_ns=COLD_START_NS,
    )
    simulation = Simulation(plan, arrivals(rate, seconds, seed))
    outcome = simulation.run((seconds + rest_s) * NS_PER_S)
    simulation.check()
    return Run(outcome=outcome, summary=summarize(outcome))


def _always(rate: float, _: float) -> float:
    return rate


def arrivals(rate: Rate, seconds: int, seed: str) -> Iterator[Request]:
    """A Poisson process of a rate that changes: time runs as fast as the rate says."""
    clock_s = 0.0
    unit = generate(SHAPE, count=1 << 30, seed=seed, arrivals=Arrivals(rate_per_s=1.0))
    done = 0.0  # expected requests so far
    step_s = 0.05
    for request in unit:
        due = request.arrival / NS_PER_S
        while done < due:
            done += rate(clock_s) * step_s
            clock_s += step_s
            if clock_s > seconds - 60:
                return  # the last ones should end within the run
        yield replace(request, arrival=round(clock_s * NS_PER_S))


def constant(seed: str) -> Result:
    """Twenty minutes at one rate: whatever happens, happens in the first ten."""
    rows = [HEAD]
    late, lost = [], 0
    for rate in (0.5, 2.5):
        found = run(partial(_always, rate), 1200, f"{seed}/{rate}", CONFIG)
        rows.append(found.cells(f"{rate} requests/s"))
        late.append(sum(when > 600 for when, _ in found.changes))
        lost += found.lost
    return Result(
        rows=tuple(rows),
        targets=(
            Target(text="no change after ten minutes", found=str(late), met=not any(late)),
            Target(text="no request is lost", found=str(lost), met=not lost),
        ),
    )


def ramp(seed: str) -> Result:
    """From 0.5 to 5 requests/s in ten minutes, with and without a look ahead."""

    def rate(second: float) -> float:
        return 0.5 + 4.5 * min(1.0, max(0.0, (second - 120) / 600))

    ahead = run(rate, 900, seed, CONFIG)
    blind = run(rate, 900, seed, replace(CONFIG, horizon_s=0.0))
    waits = [one.summary.tiers[0].ttft_ms.p99 for one in (ahead, blind)]
    ups = [b - a for (_, a), (_, b) in pairwise(ahead.changes)]
    return Result(
        rows=(HEAD, ahead.cells("30 s ahead"), blind.cells("no forecast")),
        targets=(
            Target(text="no request is lost", found=f"{ahead.lost}", met=not ahead.lost),
            Target(
                text="looking ahead does not make anybody wait longer (TTFT p99)",
                found=f"{waits[0]:.0f} against {waits[1]:.0f} ms",
                met=waits[0] <= 1.05 * waits[1],
            ),
            Target(
                text="a ramp is only ever followed upwards",
                found=str([value for _, value in ahead.changes]),
                met=all(step > 0 for step in ups),
            ),
        ),
    )


def burst(seed: str) -> Result:
    """A minute of eight times the rate, then calm: up at once, down when it is safe."""

    def rate(second: float) -> float:
        return 6.0 if 300 <= second < 360 else 0.75

    found = run(rate, 1200, seed, CONFIG)
    first_up = next(when for when, value in found.changes if when >= 300 and value > 1)
    last = found.changes[-1]
    return Result(
        rows=(HEAD, found.cells("burst")),
        targets=(
            Target(
                text="the first step up comes within 15 s of the burst",
                found=f"after {first_up - 300} s",
                met=first_up <= 315,
            ),
            Target(
                text="at the end there are as many as before",
                found=f"{last[1]} since {last[0]} s",
                met=last[1] <= 2 and last[0] >= 360 + CONFIG.hold_s,
            ),
            Target(text="no request is lost", found=str(found.lost), met=not found.lost),
        ),
    )


def season(seed: str) -> Result:
    """Days of a quarter of an hour: from the second on, the morning is expected."""
    day_s = 900
    forecast = ForecastConfig(slot_s=60.0, period_s=float(day_s))
    knows = replace(CONFIG, forecast=forecast, horizon_s=60.0)
    blind = replace(CONFIG, horizon_s=0.0)

    def rate(second: float) -> float:
        return 2.4 - 2.1 * sin(2 * pi * second / day_s + pi / 2)

    found = [run(rate, 2 * day_s, seed, config) for config in (knows, blind)]
    waits = [_late_p99(one, day_s) for one in found]
    return Result(
        rows=(HEAD, found[0].cells("with forecast"), found[1].cells("without")),
        targets=(
            Target(
                text="TTFT p99 on the second day is no worse than without a forecast",
                found=f"{waits[0]:.0f} against {waits[1]:.0f} ms",
                met=waits[0] <= waits[1],
            ),
            Target(
                text="no request is lost",
                found=str([one.lost for one in found]),
                met=not any(one.lost for one in found),
            ),
        ),
    )


def sleep(seed: str) -> Result:
    """Ten minutes of work, twenty of nothing, and a request: to zero, and back for it."""
    config = replace(CONFIG, min_replicas=0, idle_s=120.0)

    def rate(second: float) -> float:
        return 1.0 if second < 600 else 0.0 if second < 1800 else 0.3

    found = run(rate, 2100, seed, config)
    asleep = [one for one in found.outcome.samples if not one.ready + one.starting + one.draining]
    woken = [one for one in found.outcome.timelines if one.request.arrival >= 1800 * NS_PER_S]
    first_s = (woken[0].ttft_ns or 0) / NS_PER_S
    return Result(
        rows=(HEAD, found.cells("asleep for a while")),
        targets=(
            Target(
                text="no replica while there is nothing to do",
                found=f"{len(asleep)} s of 1,200 without any",
                met=1050 <= len(asleep) <= 1100,
            ),
            Target(
                text="who comes first waits for a cold start, and not much longer",
                found=f"{first_s:.1f} s, of which {COLD_START_NS / NS_PER_S:.0f} s start",
                met=8.0 <= first_s <= 11.0,
            ),
            Target(text="no request is lost", found=str(found.lost), met=not found.lost),
        ),
    )


def _late_p99(found: Run, after_s: int) -> float:
    late = [one for one in found.outcome.timelines if one.request.arrival >= after_s * NS_PER_S]
    return spread(one.ttft_ns for one in late).p99


SCENARIOS = (
    Scenario(name="constant", text="one rate: the number of replicas settles", run=constant),
    Scenario(name="ramp", text="a rate that grows: replicas come in time", run=ramp),
    Scenario(name="burst", text="a minute of eight times the rate", run=burst),
    Scenario(
        name="season", text="days of a quarter of an hour, with and without forecast", run=season
    ),
    Scenario(name="sleep", text="to zero when idle, and back for a request", run=sleep),
)
