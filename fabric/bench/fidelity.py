"""`fabric bench fidelity`: what the simulator foretells of our own server, beside the server.

A table of this machine's steps is measured in process, three constants of HTTP and Ray Serve with
requests of one length, and the server's capacity with requests of the trace. Then the server gets a
slice of the trace at shares of that capacity, and so does the simulator, which knows the table, the
constants and the configuration, and nothing of what the server did with the slice.

A machine of which others have a part is not as fast in each minute: a wave of requests and some
prompts before and after each slice say what everything takes just then, and the table is taken
times that.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fabric.bench.client import Endpoint
from fabric.bench.front import serve
from fabric.bench.front_costs import measure_front, pace_of
from fabric.bench.load import send
from fabric.bench.profile import read, render, write
from fabric.bench.report import DISTURBING_CPUS, align, machine, write_json
from fabric.bench.server import Server, ServerError, Usage
from fabric.bench.stats import NS_PER_S, Sample
from fabric.bench.step_table import Facts, Loaded, Table, facts_of, measure
from fabric.core.request import Request
from fabric.workload.replay import Replay, replay

KV_BYTES = 1 << 30
UNDER_WAY = 24  # while the capacity is measured
WITHIN = 0.10
LOADS = (30, 70, 110)

HELP = """\
Replays a slice of a trace against our own server (the demo model, started for it) at shares of its
measured capacity, and in the simulator; prints the medians of TTFT, TPOT and E2E and how far the
simulator is off. What steps take is measured first (or read: --costs FILE of `fabric profile
--front`). About seven minutes, five of them with the server; nothing else should run.

examples:
  fabric bench fidelity --trace ../shared/data/azure2023/AzureLLMInferenceTrace_conv.csv
  fabric bench fidelity --trace conv.csv --seconds 30 --loads 70"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """One request that was answered to its end, as its client saw it; ms. See `stats`."""

    ttft_ms: float
    tpot_ms: float | None
    e2e_ms: float


# Costs, configuration, requests -> what the simulator says of those that end.
Foretell = Callable[[Path, Path, Sequence[Request]], Sequence[Latency]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One quantity at one load, in ms."""

    load: int
    name: str
    live: float
    foretold: float

    @property
    def error(self) -> float:
        """Of the live one."""
        return self.foretold / self.live - 1

    @property
    def met(self) -> bool:
        """Within the target."""
        return abs(self.error) <= WITHIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """A load: what was sent, what came of it here and there, and who disturbed it."""

    load: int
    requests: int
    live: Sequence[Latency]
    foretold: Sequence[Latency]
    others: float
    paces: tuple[float, float] = (1.0, 1.0)  # before and after, of what was measured first

    def figures(self) -> list[Figure]:
        """Medians. Raises `ValueError` where nobody was answered."""
        found = []
        for name, of in (("TTFT", _ttft), ("TPOT", _tpot), ("E2E", _e2e)):
            live, foretold = (
                statistics.median(value for one in side if (value := of(one)) is not None)
                for side in (self.live, self.foretold)
            )
            found.append(Figure(load=self.load, name=name, live=live, foretold=foretold))
        return found


def run(words: Sequence[str], load: Callable[[], Loaded], foretell: Foretell) -> int:
    """Measure, foretell, print, write; 1 if a target is missed or the server failed."""
    arguments = parser().parse_args(words)
    target: Path = arguments.json or Path("bench-results/fidelity.json")
    print(machine(), flush=True)
    try:
        capacity, replays = _measure(arguments, target.parent, load, foretell)
        figures = [figure for one in replays for figure in one.figures()]
    except (ServerError, ValueError, OSError) as problem:
        print(f"fabric bench fidelity: {problem}", file=sys.stderr)
        return 1
    print(align(rows(figures)))
    for one in replays:
        print(
            f"{one.load} %: {one.requests} requests, {len(one.live)} answered here and "
            f"{len(one.foretold)} there; everything took {one.paces[0]:.2f} before and "
            f"{one.paces[1]:.2f} after of what was measured; others took {one.others:.2f} CPUs"
        )
    if any(one.others > DISTURBING_CPUS for one in replays):
        print("disturbed by other processes: don't quote it")
    record = {
        "trace": str(arguments.trace), "seed": arguments.seed, "scale": arguments.scale,
        "capacity_rps": capacity, "replays": [asdict(one) for one in replays],
        "figures": [asdict(one) | {"error": one.error, "met": one.met} for one in figures],
    }  # fmt: skip
    write_json(target, record)
    print(f"all figures: {target}")
    return 0 if all(one.met for one in figures) else 1


def rows(figures: Sequence[Figure]) -> list[list[str]]:
    """Heads, and a line a figure."""
    table = [["load", "median", "live ms", "foretold ms", "error", f"within {WITHIN:.0%}"]]
    for one in figures:
        verdict = "met" if one.met else "MISSED"
        cells = [f"{one.load} %", one.name, f"{one.live:.1f}", f"{one.foretold:.1f}"]
        table.append([*cells, f"{one.error:+.1%}", verdict])
    return table


def capacity_rps(samples: Sequence[Sample]) -> float:
    """Requests a second while a closed loop was full: the ends between those of the first and of
    the last that were under way together. Raises `ValueError`."""
    ends = sorted(one.times[-1] for one in samples if one.error is None)
    full = ends[UNDER_WAY:-UNDER_WAY]
    if len(full) < UNDER_WAY or full[-1] == full[0]:
        raise ValueError(f"of {len(samples)} requests {len(ends)} were answered: no capacity")
    return (len(full) - 1) * NS_PER_S / (full[-1] - full[0])


def _measure(
    arguments: argparse.Namespace, folder: Path, load: Callable[[], Loaded], foretell: Foretell
) -> tuple[float, list[Replayed]]:
    """The capacity, and each load."""
    found = None if arguments.costs else _table(load())
    launch = serve(folder, {"device_bytes": KV_BYTES, "host_bytes": 0})
    answered: list[_Answered] = []
    with Server(launch) as server:
        if found is None:
            facts, table, front = read(arguments.costs)
        else:
            facts, table = found
            front = measure_front(server, table)
            write(folder / "costs.json", facts, table, front)
        print(front.render(), flush=True)
        endpoint = Endpoint(url=launch.url, model=server.model)
        capacity = _capacity(endpoint, arguments)
        print(f"capacity: {capacity:.2f} requests/s", flush=True)
        paces = [pace_of(endpoint, table, front, "first")]
        for share in arguments.loads:
            requests = slice_of(arguments, share, capacity * share / 100)
            used = Usage.now(server)
            samples = asyncio.run(send(endpoint, requests))
            others = used.others_until_now(server)
            paces.append(pace_of(endpoint, table, front, str(share)))
            answered.append(_Answered(share, requests, samples, others, (paces[-2], paces[-1])))
    replays = []
    for one in answered:
        pace = statistics.fmean(one.paces)
        costs = folder / f"costs-{one.share}.json"
        write(costs, facts, table.times(pace), front.times(pace))
        replays.append(
            Replayed(
                load=one.share,
                requests=len(one.requests),
                live=[latency(each) for each in one.samples if each.error is None],
                foretold=foretell(costs, folder / "front.yaml", one.requests),
                others=one.others,
                paces=one.paces,
            )
        )
    return capacity, replays


def _table(subject: Loaded) -> tuple[Facts, Table]:
    facts, table = facts_of(subject, "demo"), measure(subject)
    print(render(table), flush=True)
    return facts, table


@dataclass(frozen=True, slots=True)
class _Answered:
    """What one load has brought, before it is foretold."""

    share: int
    requests: list[Request]
    samples: list[Sample]
    others: float
    paces: tuple[float, float]


def slice_of(arguments: argparse.Namespace, share: int, rate_per_s: float) -> list[Request]:
    """The trace's begin at this rate, for `--seconds`. No two loads have a prompt in common."""
    how = Replay(
        seed=f"{arguments.seed}/{share}",
        rate_per_s=rate_per_s,
        scale=arguments.scale,
        limit=max(8, round(rate_per_s * arguments.seconds)),
    )
    return list(replay(arguments.trace, how))


def _capacity(endpoint: Endpoint, arguments: argparse.Namespace) -> float:
    how = Replay(seed=f"{arguments.seed}/capacity", scale=arguments.scale, limit=4 * UNDER_WAY)
    requests = [replace(one, arrival=0) for one in replay(arguments.trace, how)]
    return capacity_rps(asyncio.run(send(endpoint, requests, UNDER_WAY)))


def latency(sample: Sample) -> Latency:
    """Of a request that was answered."""
    return Latency(ttft_ms=sample.ttft_ms, tpot_ms=sample.tpot_ms, e2e_ms=sample.e2e_ms)


def _ttft(one: Latency) -> float | None:
    return one.ttft_ms


def _tpot(one: Latency) -> float | None:
    return one.tpot_ms


def _e2e(one: Latency) -> float | None:
    return one.e2e_ms


def parser() -> argparse.ArgumentParser:
    """Its flags; tests/law/test_cli.py freezes them."""
    command = argparse.ArgumentParser(
        prog="fabric bench fidelity",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--trace", type=Path, required=True, metavar="FILE", help="Azure's CSV, or another one")
    add("--loads", type=int, nargs="+", default=list(LOADS), metavar="PERCENT", help="of capacity")
    add("--seconds", type=float, default=60.0, metavar="S", help="of each load (default: 60)")
    add("--scale", type=float, default=0.125, help="of prompts and outputs (default: 1/8)")
    add("--costs", type=Path, metavar="FILE", help="of `fabric profile --front`; not measured anew")
    add("--seed", default="0")
    add("--json", type=Path, metavar="FILE", help="(default: bench-results/fidelity.json)")
    return command
