"""Each rung of the degrade ladder: a load under which it fires, and one under which it must not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fabric.core.configs import AdmissionConfig, DegradeConfig, Rung, RungKind
from fabric.core.request import Request
from fabric.core.tiers import Tier
from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import DEMO_CPU
from fabric.sim.records import Outcome
from fabric.sim.scenarios.result import Result, Scenario, Target, head, row
from fabric.sim.simulation import Plan, Simulation
from fabric.sim.slo import SloControl
from fabric.workload import Arrivals, Lengths, Workload, generate

TIERS = (
    Tier(name="interactive", ttft_ms=1_000, tpot_ms=150, weight=4.0),
    Tier(name="standard", ttft_ms=3_000, tpot_ms=300, weight=2.0),
    Tier(name="batch", ttft_ms=60_000, tpot_ms=2_000),
)
RUNGS = (
    Rung(kind=RungKind.DRAFT),
    Rung(kind=RungKind.CAP, amount=16),
    Rung(kind=RungKind.CHEAPER, tier="standard", version="small"),
    Rung(kind=RungKind.SHED, tier="batch"),
    Rung(kind=RungKind.SHED, tier="standard"),
)
SECONDS = 60
SHAPE = Workload(name="degrading", prompt=Lengths(median=64), output=Lengths(median=24))
ENOUGH_PER_S = 0.6  # of what DEMO_CPU does with this shape
TOO_MUCH_PER_S = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Requests a second of each tier."""

    interactive: float = ENOUGH_PER_S
    standard: float = ENOUGH_PER_S
    batch: float = ENOUGH_PER_S


# The tier that a rung protects is overrun in the first; only those that it takes from in the other.
OVERRUN = Load(interactive=TOO_MUCH_PER_S)
CASES: Sequence[tuple[Rung, Load, Load]] = (
    (RUNGS[0], OVERRUN, Load()),
    (RUNGS[1], OVERRUN, Load()),
    (RUNGS[2], OVERRUN, Load(standard=TOO_MUCH_PER_S, interactive=0.0, batch=0.0)),
    (RUNGS[3], OVERRUN, Load(batch=TOO_MUCH_PER_S, interactive=0.0, standard=0.0)),
    (RUNGS[4], OVERRUN, Load(standard=TOO_MUCH_PER_S, interactive=0.0)),
)


def run(rung: Rung, load: Load, seed: str) -> tuple[SloControl, Outcome]:
    """One rung alone on the ladder, under this load, for a minute."""
    arrivals: list[Request] = []
    for tier in TIERS:
        rate = getattr(load, tier.name)
        if rate:
            found = generate(
                SHAPE, count=int(rate * SECONDS), seed=f"{seed}-{tier.name}",
                arrivals=Arrivals(rate_per_s=rate),
            )  # fmt: skip
            arrivals += [
                replace(one, request_id=f"{tier.name}-{one.request_id}", tier=tier.name)
                for one in found
            ]
    arrivals.sort(key=lambda one: one.arrival)
    admission = AdmissionConfig(tiers=TIERS, max_queued_requests=128, queue_ttl_s=20.0)
    engine = replace(DEMO_CPU.engine, tiers=TIERS)
    plan = Plan(profile=replace(DEMO_CPU, engine=engine), admission=admission)
    simulation = Simulation(plan, arrivals)
    control = SloControl(simulation, TIERS, DegradeConfig(rungs=(rung,)))
    outcome = simulation.run(SECONDS * NS_PER_S)
    return control, outcome


def degrade_ladder(seed: str) -> Result:
    """Every rung under both loads."""
    rows = [head("rung | load | entered | left | at s | why")]
    targets = []
    for rung, fires, rests in CASES:
        for load, wanted in ((fires, True), (rests, False)):
            control, outcome = run(rung, load, seed)
            assert control.ladder is not None
            entered = control.ladder.moves.get((rung.name, "entered"), 0)
            left = control.ladder.moves.get((rung.name, "left"), 0)
            first = outcome.decisions[0] if outcome.decisions else None
            at, why = (first.at / NS_PER_S, first.why) if first else ("", "")
            rows.append(row(rung.name, _words(load), entered, left, at, why))
            targets.append(
                Target(
                    text=f"{rung.name} {'fires' if wanted else 'rests'} ({_words(load)})",
                    found=f"entered {entered} times",
                    met=bool(entered) == wanted,
                )
            )
    return Result(rows=tuple(rows), targets=tuple(targets))


def _words(load: Load) -> str:
    return f"{load.interactive:g}/{load.standard:g}/{load.batch:g} a second"


SCENARIOS = (
    Scenario(
        name="degrade-ladder",
        text="each rung under a load in which it fires and one in which it must not",
        run=degrade_ladder,
    ),
)
