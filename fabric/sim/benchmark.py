"""`fabric bench simulator`: how much faster than time, and in how much memory."""

from __future__ import annotations

import argparse
import gc
import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.sim.clock import NS_PER_S
from fabric.sim.costs import profile
from fabric.sim.simulation import FAST_NEWS_NS, Plan, Simulation
from fabric.workload import Arrivals, generate, workload

HELP = """\
Simulates a fleet under a Poisson load, twice: with every step through the engine, and with decode
steps that are all alike done at once. Prints events a second of CPU time, the ratio to real time
and the peak of memory. One core is used.

examples:
  fabric bench simulator
  fabric bench simulator --replicas 1000 --rate 6000 --requests 1000000 --only fast"""

MB = 1 << 20
TARGETS = (("every step", 8.0), ("fast", 30.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What one run took. `seconds`: of the simulated system; `cpu_s`: of this process."""

    seconds: float
    cpu_s: float
    events: int
    steps: int
    tokens: int
    finished: int

    @property
    def ratio(self) -> float:
        """Of simulated to real time."""
        return self.seconds / max(self.cpu_s, 1e-9)


def main(words: Sequence[str]) -> int:
    """Run `fabric bench simulator WORDS...`; 1: a target is missed."""
    arguments = parser().parse_args(words)
    print(
        f"{arguments.replicas} replicas of {arguments.profile}, {arguments.rate:g} requests/s, "
        f"{arguments.requests:,} requests of workload {arguments.workload}"
    )
    met = True
    for name, target in TARGETS:
        if arguments.only not in (None, name.split()[0]):
            continue
        found = run(arguments, fast=name == "fast")
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
        print(
            f"  {name:10} {found.seconds:8.1f} s in {found.cpu_s:8.1f} s of CPU: "
            f"{found.ratio:6.1f} × real time (target {target:g}), "
            f"{found.events / found.cpu_s:,.0f} events/s, "
            f"{found.steps / found.cpu_s:,.0f} steps/s, {found.tokens / found.cpu_s:,.0f} tokens/s "
            f"({found.finished:,} finished), {peak_mb:,.0f} MB at most",
            flush=True,
        )
        met = met and found.ratio >= target
    return 0 if met else 1


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    command = argparse.ArgumentParser(
        prog="fabric bench simulator",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--replicas", type=int, default=16, help="(default: 16)")
    add("--rate", type=float, default=100.0, help="requests a second (default: 100)")
    add("--requests", type=int, default=2000, help="(default: 2000)")
    add("--profile", default="H100:llama-8b", help="(default: H100:llama-8b)")
    add("--workload", default="mixed", help="(default: mixed)")
    add("--only", choices=("every", "fast"), help="one of the two runs")
    return command


def run(arguments: argparse.Namespace, *, fast: bool) -> Speed:
    """One run. What the simulation keeps has no cycles: collecting them would only take time."""
    plan = Plan(
        profile=profile(arguments.profile),
        replicas=arguments.replicas,
        lean=True,
        news_ns=FAST_NEWS_NS if fast else None,
    )
    requests = generate(
        workload(arguments.workload),
        count=arguments.requests,
        seed="speed",
        arrivals=Arrivals(rate_per_s=arguments.rate),
    )
    simulation = Simulation(plan, requests)
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        outcome = simulation.run()
        spent_s = time.process_time() - began
    finally:
        gc.enable()
    simulation.check()
    snapshots = [one.engine.snapshot("", 0) for one in simulation.fleet.replicas.values()]
    return Speed(
        seconds=outcome.ended / NS_PER_S,
        cpu_s=spent_s,
        events=outcome.events,
        steps=sum(one.steps_total for one in snapshots),
        tokens=sum(one.generated_tokens_total for one in snapshots),
        finished=sum(one.finished_total for one in snapshots),
    )
