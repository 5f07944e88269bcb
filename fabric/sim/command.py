"""`fabric simulate`: one run from flags, or a named scenario; tables, or JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fabric.config import FabricConfig, load_config
from fabric.sim.costs import DEMO_CPU, Profile, profile
from fabric.sim.scenarios import SCENARIOS, Result, scenario
from fabric.sim.simulation import Plan, Simulation
from fabric.sim.summary import Spread, Summary, summarize
from fabric.sim.table import align
from fabric.workload import WORKLOADS, Arrivals, generate, workload

HELP = """\
Runs the real engines, admission and routers under a virtual clock, with a cost model in place of
the hardware. Same words, same result, on any machine.

SCENARIO runs one of the named experiments, each with its targets; `all` runs them all:
{scenarios}

examples:
  fabric simulate --replicas 4 --rate 2 --workload mixed
  fabric simulate --profile H100:llama-8b --replicas 16 --rate 100 --seconds 60
  fabric simulate all"""


def main(words: Sequence[str]) -> int:
    """Run `fabric simulate WORDS...`; 1 when a scenario missed a target, 2 for wrong words."""
    arguments = parser().parse_args(words)
    try:
        if arguments.scenario:
            return _scenarios(arguments)
        return _run(arguments)
    except ValueError as problem:
        print(f"fabric simulate: {problem}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    names = "\n".join(f"  {one.name:24} {one.text}" for one in SCENARIOS)
    command = argparse.ArgumentParser(
        prog="fabric simulate",
        description=HELP.format(scenarios=names),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "scenario", nargs="?", metavar="SCENARIO", help="a name from above, or all"
    )
    command.add_argument("--config", type=Path, metavar="FILE", help="YAML file of `fabric serve`")
    command.add_argument(
        "--profile",
        default=DEMO_CPU.name,
        metavar="NAME",
        help="what a step costs: demo-cpu, or GPU:MODEL such as H100:llama-8b",
    )
    command.add_argument("--workload", choices=[one.name for one in WORKLOADS], default="mixed")
    command.add_argument("--rate", type=float, default=1.0, help="requests a second")
    command.add_argument("--seconds", type=float, default=60.0, help="how long they arrive")
    command.add_argument("--replicas", type=int, help="(default: the configuration's)")
    command.add_argument("--seed", default="0")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return command


def plan_of(config: FabricConfig, chosen: Profile) -> Plan:
    """What a configuration of `fabric serve` says to a simulation, on a profile's hardware."""
    engine = replace(
        chosen.engine,
        max_sequences=config.engine.max_sequences,
        step_tokens=config.engine.step_tokens,
        chunk_tokens=config.engine.chunk_tokens,
        prefix_cache=config.kv.prefix_cache,
    )
    return Plan(
        profile=replace(chosen, engine=engine),
        replicas=config.replicas,
        dispatchers=config.server.ingress_replicas,
        admission=config.admission.core(),
    )


def _run(arguments: argparse.Namespace) -> int:
    chosen = profile(arguments.profile)
    plan = Plan(profile=chosen)
    if arguments.config:
        plan = plan_of(load_config(arguments.config), chosen)
    if arguments.replicas is not None:
        plan = replace(plan, replicas=arguments.replicas)
    requests = generate(
        workload(arguments.workload),
        count=max(1, round(arguments.rate * arguments.seconds)),
        seed=arguments.seed,
        arrivals=Arrivals(rate_per_s=arguments.rate),
    )
    began = time.process_time()
    summary = summarize(Simulation(plan, requests).run())
    spent_s = time.process_time() - began
    print(render(summary))
    print(
        f"{summary.seconds:.0f} s simulated in {spent_s:.1f} s of CPU time: "
        f"{summary.seconds / max(spent_s, 1e-9):.1f} × real time"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(summary.record(), indent=2) + "\n")
    return 0


def _scenarios(arguments: argparse.Namespace) -> int:
    chosen = SCENARIOS if arguments.scenario == "all" else (scenario(arguments.scenario),)
    results: list[Result] = []
    for one in chosen:
        result = one.run(arguments.seed)
        results.append(result)
        print(f"{one.name}: {one.text}\n{result.render()}\n", flush=True)
    if arguments.json:
        records = [result.record(one.name) for one, result in zip(chosen, results, strict=True)]
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")
    return 0 if all(result.met for result in results) else 1


def render(summary: Summary) -> str:
    """A summary as tables."""
    head = ["tier", "requests", "finished", "refused", "preempted", "attained"]
    head += ["queue ms", "TTFT ms", "TPOT ms", "E2E ms"]
    rows = [head]
    for one in summary.tiers:
        counts = [one.requests, one.finished, one.refused, one.preempted]
        spreads = (one.queued_ms, one.ttft_ms, one.tpot_ms, one.e2e_ms)
        rows.append([one.tier, *map(str, counts), f"{one.attained:.1%}", *map(_spread, spreads)])
    lines = [align(rows), "(p50 / p90 / p99)", ""]
    lines.append(
        f"{summary.tokens_per_s:,.1f} tokens/s, {summary.goodput_per_s:.2f} requests/s within "
        f"their targets, {summary.replica_hours:.3f} replica-hours, "
        f"at most {summary.replicas_peak} ready"
    )
    lines += [f"refused: {count} × {reason}" for reason, count in summary.refusals.items()]
    return "\n".join(lines)


def _spread(one: Spread) -> str:
    return f"{one.p50:,.0f} / {one.p90:,.0f} / {one.p99:,.0f}"
