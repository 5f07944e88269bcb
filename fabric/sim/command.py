"""`fabric simulate`: a load or a trace under a configuration, or a named scenario; tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

from fabric.config import load_config
from fabric.core.configs import DegradeConfig
from fabric.core.journal import Recorder
from fabric.core.request import Request
from fabric.journal.format import SUFFIX
from fabric.journal.writer import Place, Writer
from fabric.sim.cost_file import read_costs
from fabric.sim.costs import DEMO_CPU, profile
from fabric.sim.deployment import Deployment, deployment_of
from fabric.sim.oracle import fidelity
from fabric.sim.report import html
from fabric.sim.scenarios import SCENARIOS, Result, scenario
from fabric.sim.scenarios.result import over_seeds
from fabric.sim.simulation import FAST_NEWS_NS, Plan
from fabric.sim.slo import OBJECTIVE
from fabric.sim.studies import STUDIES, study
from fabric.sim.studies.study import Recorded
from fabric.sim.summary import summarize
from fabric.sim.text import Run, compare, render
from fabric.workload import WORKLOADS, Arrivals, generate, workload
from fabric.workload.replay import Replay, replay

HELP = """\
Runs the real engines, admission, routers and autoscalers under a virtual clock, with a cost model
in place of the hardware. Same words, same result, on any machine.

SCENARIO runs one of the named experiments, each with its targets; `all` runs them all:
{scenarios}

`study NAME` runs a longer one, whose results stand in docs/studies.md:
{studies}

--trace replays a file: Azure or BurstGPT CSV, Mooncake or our own JSONL (README, "Traces").

examples:
  fabric simulate --replicas 4 --rate 2 --workload mixed
  fabric simulate --profile H100:llama-8b --replicas 16 --rate 100 --seconds 60
  fabric simulate --trace conv.csv --requests 2000 --profile H100:llama-8b \\
      --config deployments/single.yaml --compare deployments/autoscaling.yaml
  fabric simulate --oracle tests/data/oracle_rtx4090
  fabric simulate all"""


def main(words: Sequence[str]) -> int:
    """Run `fabric simulate WORDS...`; 1 when a scenario missed a target, 2 for wrong words."""
    arguments = parser().parse_args(words)
    try:
        if arguments.oracle:
            return _oracle(arguments)
        if arguments.scenario:
            return _scenarios(arguments)
        return _run(arguments)
    except (ValueError, OSError) as problem:
        print(f"fabric simulate: {problem}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    names = "\n".join(f"  {one.name:24} {one.text}" for one in SCENARIOS)
    studies = "\n".join(f"  {one.name:24} {one.text}" for one in STUDIES)
    command = argparse.ArgumentParser(
        prog="fabric simulate",
        description=HELP.format(scenarios=names, studies=studies),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("scenario", nargs="*", metavar="SCENARIO", help="a name from above, or all")
    add("--config", type=Path, metavar="FILE", help="YAML file of `fabric serve`")
    add("--compare", type=Path, metavar="FILE", help="another one, side by side")
    add(
        "--profile",
        default=DEMO_CPU.name,
        metavar="NAME",
        help="what a step costs: demo-cpu, or GPU:MODEL[:COUNT][:fp8]",
    )
    add("--costs", type=Path, metavar="FILE", help="what `fabric profile` measured, instead")
    add("--trace", type=Path, metavar="FILE", help="replay this instead of a workload")
    add("--speed", type=float, default=1.0, help="of the trace: 2 is twice as fast")
    add("--scale", type=float, default=1.0, help="of the trace's prompts and outputs")
    add("--requests", type=int, metavar="N", help="of the trace, from its begin (default: all)")
    add("--oracle", type=Path, metavar="FOLDER", help="foretell a recorded run, print the errors")
    add("--workload", choices=[one.name for one in WORKLOADS], default="mixed")
    add("--rate", type=float, help="requests a second (default: 1, or as the trace has it)")
    add("--seconds", type=float, default=60.0, help="how long a workload's requests arrive")
    add("--replicas", type=int, help="(default: the configuration's)")
    add("--fast", action="store_true", help="like decode steps at once; news is 0.1 s late at most")
    add("--seed", default="0")
    add("--seeds", type=int, default=1, metavar="N", help="of a scenario: this one and those after")
    add("--html", type=Path, metavar="FILE", help="write a report with plots there")
    add("--journal", type=Path, metavar="FOLDER", help="write decisions there: `fabric replay`")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")
    return command


def _run(arguments: argparse.Namespace) -> int:
    files = [one for one in (arguments.config, arguments.compare) if one is not None]
    if arguments.compare and not arguments.config:
        raise ValueError("--compare needs --config: what is it compared with?")
    if arguments.journal is not None and any(arguments.journal.glob(f"*{SUFFIX}")):
        raise ValueError(f"--journal: {arguments.journal} holds another run's journal")
    runs: list[Run] = []
    for deployment in [_deployment(arguments, one) for one in files or [None]]:
        began = time.process_time()
        writer = _writer(arguments, len(runs))
        outcome = deployment.run(_requests(arguments), Recorder(writer) if writer else None)
        if writer is not None:
            writer.close()
        spent_s = time.process_time() - began
        plan = deployment.plan
        summary = summarize(outcome, plan.admission.tiers, plan.profile)
        run = Run(name=deployment.name, profile=plan.profile, outcome=outcome, summary=summary)
        runs.append(run)
        if len(files) > 1:
            print(deployment.name)
        print(render(run))
        print(
            f"{summary.seconds:.0f} s simulated in {spent_s:.1f} s of CPU time: "
            f"{summary.seconds / max(spent_s, 1e-9):.1f} × real time\n",
            flush=True,
        )
    if len(runs) > 1:
        print(compare(runs))
    if arguments.html:
        arguments.html.write_text(html(runs, _heading(arguments)), encoding="utf-8")
    if arguments.json:
        records = [one.record() for one in runs]
        found = records[0] if len(records) == 1 else records
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _heading(arguments: argparse.Namespace) -> str:
    what = arguments.trace.name if arguments.trace else f"workload {arguments.workload}"
    on = arguments.costs.name if arguments.costs else arguments.profile
    return f"{what} on {on}, seed {arguments.seed}"


def _writer(arguments: argparse.Namespace, number: int) -> Writer | None:
    """For the journal of one run; a simulation keeps it all."""
    if arguments.journal is None:
        return None
    name = f"seed-{arguments.seed}"
    place = Place(
        folder=arguments.journal, stream="simulation", name=name, run=str(number), files=1_000_000
    )
    return Writer(place, background=False)


def _deployment(arguments: argparse.Namespace, file: Path | None) -> Deployment:
    chosen = read_costs(arguments.costs) if arguments.costs else profile(arguments.profile)
    if file is None:
        name, plan, degrade = chosen.name, Plan(profile=chosen), DegradeConfig()
        deployment = Deployment(name=name, plan=plan, objective=OBJECTIVE, degrade=degrade)
    else:
        deployment = deployment_of(load_config(file), chosen, str(file))
    replicas = arguments.replicas
    if replicas is not None and deployment.plan.prefill is not None:
        raise ValueError("--replicas: the configuration has pools, each with its own number")
    return replace(
        deployment,
        plan=replace(
            deployment.plan,
            replicas=deployment.plan.replicas if replicas is None else replicas,
            lean=True,
            news_ns=FAST_NEWS_NS if arguments.fast else None,
        ),
    )


def _requests(arguments: argparse.Namespace) -> Iterable[Request]:
    if arguments.trace is not None:
        return replay(arguments.trace, _how(arguments))
    rate = 1.0 if arguments.rate is None else arguments.rate
    return generate(
        workload(arguments.workload),
        count=max(1, round(rate * arguments.seconds)),
        seed=arguments.seed,
        arrivals=Arrivals(rate_per_s=rate),
    )


def _oracle(arguments: argparse.Namespace) -> int:
    found = fidelity(arguments.oracle)
    print(found.render())
    if arguments.json:
        arguments.json.write_text(json.dumps(found.record(), indent=2) + "\n")
    return 0 if found.met else 1


def _seeds(arguments: argparse.Namespace) -> list[str]:
    seed, count = arguments.seed, arguments.seeds
    if count < 1:
        raise ValueError("--seeds needs a number of at least 1")
    if seed.isdecimal():
        return [str(int(seed) + number) for number in range(count)]
    return [seed, *(f"{seed}/{number}" for number in range(1, count))]


def _how(arguments: argparse.Namespace) -> Replay:
    return Replay(
        seed=arguments.seed,
        speed=arguments.speed,
        rate_per_s=arguments.rate,
        scale=arguments.scale,
        limit=arguments.requests,
    )


def _each(run: Callable[[str], Result], seeds: Sequence[str]) -> list[Result]:
    """A result a seed; several at once, as many as there are cores."""
    if len(seeds) == 1:
        return [run(seeds[0])]
    with ProcessPoolExecutor(min(len(seeds), os.cpu_count() or 1)) as pool:
        return list(pool.map(run, seeds))


def _scenarios(arguments: argparse.Namespace) -> int:
    first, *rest = arguments.scenario
    chosen: list[tuple[str, str, Callable[[str], Result]]]
    if first == "study" and len(rest) == 1:
        one = study(rest[0])
        trace = None
        if arguments.trace is not None:
            trace = Recorded(path=arguments.trace, how=_how(arguments))
        chosen = [(f"study {one.name}", one.text, partial(one.run, trace=trace))]
    elif rest:
        raise ValueError(f"one scenario at a time, not {' '.join(arguments.scenario)}")
    else:
        those = SCENARIOS if first == "all" else (scenario(first),)
        chosen = [(one.name, one.text, one.run) for one in those]
    results: list[Result] = []
    for name, text, run in chosen:
        result = over_seeds(_each(run, _seeds(arguments)))
        results.append(result)
        print(f"{name}: {text}\n{result.render()}\n", flush=True)
    if arguments.json:
        records = [found.record(one[0]) for one, found in zip(chosen, results, strict=True)]
        arguments.json.write_text(json.dumps(records, indent=2) + "\n")
    return 0 if all(result.met for result in results) else 1
