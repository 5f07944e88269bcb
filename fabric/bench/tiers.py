"""`fabric bench tiers`: interactive requests on an engine that batch work saturates, live.

The same question as `fabric simulate preempting`, asked of the engine and the worker in this
process, in real time: alone, beside batch by tiers, and the same trace first come first served.
What one engine can do of each kind is measured first. A run goes on until all has ended: both serve
the same tokens, so that their throughputs can be compared. Each run is a tenant of its own: nobody
finds in the prefix cache what an earlier run computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from fabric.bench.report import align, write_json
from fabric.bench.verdict import Verdict
from fabric.core.request import Request, TokenChunk
from fabric.workload import Arrivals, Workload, generate
from fabric.workload.tiers import BATCH, BATCH_SHARE, INTERACTIVE, INTERACTIVE_SHARE, Contest

PLACES = 8
CAPACITY_REQUESTS = 24
LEFT_OUT = 3  # steps are cut short only once interactive requests have begun to come
NS_PER_S = 1_000_000_000

HELP = """\
Interactive requests at 30 % of what an engine can do, batch at 270 %: engine and worker in this
process, no HTTP, no Ray. Takes about four minutes on two cores.

examples:
  fabric bench tiers
  fabric bench tiers --seconds 60 --json tiers.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted:
    """Tokens whose KV preempted sequences had, ever, and those of them computed again."""

    preemptions: int
    tokens: int
    dropped: int


class Counts(Protocol):
    """What an engine has counted, ever."""

    @property
    def preemptions_total(self) -> int:
        """Sequences that were preempted."""
        ...

    @property
    def preempted_tokens_total(self) -> int:
        """Tokens whose KV they had."""
        ...

    @property
    def dropped_tokens_total(self) -> int:
        """Of those: computed again."""
        ...


class Engine(Protocol):
    """As the core's."""

    @property
    def has_work(self) -> bool:
        """Does anything wait or run?"""
        ...

    def snapshot(self, replica_id: str, now: int) -> Counts:
        """What it says of itself."""
        ...


class Subject(Protocol):
    """An engine with its worker, as `fabric.driver.LLM` is one."""

    @property
    def engine(self) -> Engine:
        """The engine alone."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request."""
        ...

    def step(self) -> list[TokenChunk]:
        """One turn; only while there is work."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """TTFT of the interactive requests, ms; output tokens a second; the 99th percentile of a step;
    what was preempted meanwhile."""

    name: str
    ttft_ms_p50: float
    ttft_ms_p99: float
    requests: int
    tokens_per_s: float
    step_ms_p99: float
    preempted: Preempted


def run(words: Sequence[str], load: Callable[[int], Subject]) -> int:
    """Measure, print, write the record if asked; 1 if a target was missed. `load`: an engine with
    so many places."""
    arguments = parser().parse_args(words)
    subject = load(PLACES)
    rates = {
        shape.name: share * _capacity(subject, shape, arguments.seed)
        for shape, share in ((INTERACTIVE, INTERACTIVE_SHARE), (BATCH, BATCH_SHARE))
    }
    interactive = _trace(INTERACTIVE, rates, arguments)
    both = sorted([*interactive, *_trace(BATCH, rates, arguments)], key=lambda one: one.arrival)
    fifo = [replace(one, tier="standard") for one in both]
    runs = []
    for name, trace in (("alone", interactive), ("by tiers", both), ("one tier", fifo)):
        runs.append(_serve(subject, name, trace))
        print(f"{name}: {runs[-1].tokens_per_s:.1f} tok/s", flush=True)
    verdict = Verdict(targets=_contest(*runs).verdicts())
    print(align(_rows(runs)))
    print(verdict.text())
    if arguments.json:
        record = {
            "rates_per_s": rates,
            "runs": [asdict(one) for one in runs],
            "targets": verdict.records(),
        }
        write_json(arguments.json, record)
    return verdict.exit_code


def _capacity(subject: Subject, shape: Workload, seed: str) -> float:
    """Requests a second of this shape alone, all there from the begin."""
    began = time.perf_counter()
    for one in generate(shape, count=CAPACITY_REQUESTS, seed=f"{seed}/capacity"):
        subject.add(replace(one, arrival=time.time_ns()))
    while subject.engine.has_work:
        subject.step()
    return CAPACITY_REQUESTS / (time.perf_counter() - began)


def _trace(
    shape: Workload, rates: dict[str, float], arguments: argparse.Namespace
) -> list[Request]:
    rate = rates[shape.name]
    return list(
        generate(
            shape,
            count=max(LEFT_OUT + 1, round(rate * arguments.seconds)),
            seed=arguments.seed,
            arrivals=Arrivals(rate_per_s=rate),
        )
    )


def _serve(subject: Subject, name: str, trace: Iterable[Request]) -> Run:
    """In real time, until all have ended."""
    coming = list(trace)[::-1]
    mine = {one.request_id for one in coming if f"/{INTERACTIVE.name}/" in one.request_id}
    before, began = _preempted(subject), time.time_ns()
    due = {one.request_id: began + one.arrival for one in coming}
    first_ns: dict[str, int] = {}
    steps_ns: list[int] = []
    tokens = 0
    while coming or subject.engine.has_work:
        while coming and due[coming[-1].request_id] <= time.time_ns():
            request = coming.pop()
            subject.add(replace(request, arrival=due[request.request_id], tenant=name))
        if not subject.engine.has_work:
            time.sleep(0.001)
            continue
        stepped = time.time_ns()
        chunks = subject.step()
        now = time.time_ns()
        steps_ns.append(now - stepped)
        for chunk in chunks:
            tokens += len(chunk.tokens)
            if chunk.request_id in mine:
                first_ns.setdefault(chunk.request_id, now - due[chunk.request_id])
    seconds = (time.time_ns() - began) / NS_PER_S
    after = _preempted(subject)
    waits_ms = [first_ns[one] / 1e6 for one in sorted(mine, key=due.__getitem__) if one in first_ns]
    p50, p99 = np.percentile(waits_ms[LEFT_OUT:], [50, 99])
    return Run(
        name=name,
        ttft_ms_p50=float(p50),
        ttft_ms_p99=float(p99),
        requests=len(waits_ms) - LEFT_OUT,
        tokens_per_s=tokens / seconds,
        step_ms_p99=float(np.percentile(steps_ns, 99)) / 1e6,
        preempted=Preempted(
            preemptions=after.preemptions - before.preemptions,
            tokens=after.tokens - before.tokens,
            dropped=after.dropped - before.dropped,
        ),
    )


def _preempted(subject: Subject) -> Preempted:
    seen = subject.engine.snapshot("", 0)
    return Preempted(
        preemptions=seen.preemptions_total,
        tokens=seen.preempted_tokens_total,
        dropped=seen.dropped_tokens_total,
    )


def _contest(alone: Run, tiers: Run, fifo: Run) -> Contest:
    return Contest(
        alone_ms=alone.ttft_ms_p99,
        beside_ms=tiers.ttft_ms_p99,
        step_ms=alone.step_ms_p99,
        preempted=tiers.preempted.tokens,
        dropped=tiers.preempted.dropped,
        tokens_per_s=tiers.tokens_per_s,
        fifo_tokens_per_s=fifo.tokens_per_s,
    )


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["run", "TTFT p50 ms", "TTFT p99 ms", "of", "tok/s", "step p99 ms", "preemptions"]]
    for one in runs:
        figures = (one.ttft_ms_p50, one.ttft_ms_p99)
        rows.append(
            [
                one.name,
                *(f"{figure:.0f}" for figure in figures),
                str(one.requests),
                f"{one.tokens_per_s:.1f}",
                f"{one.step_ms_p99:.0f}",
                str(one.preempted.preemptions),
            ]
        )
    return rows


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    command = argparse.ArgumentParser(
        prog="fabric bench tiers",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="of arrivals in each of three runs"
    )
    command.add_argument("--seed", default="0")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return command
