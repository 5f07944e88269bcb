"""`fabric bench engine`: engine and worker in this process, without HTTP and Ray.

Three questions: how near a step of one sequence comes to the weight-read floor; what a closed loop
of the same requests as `fabric bench serve` gives (the ratio of the two is what HTTP and Serve
cost); and what deciding costs in Python. Whoever calls brings the engine: see `Subject`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fabric.bench.load import default_requests
from fabric.bench.report import align, write_json
from fabric.core.request import Request, SamplingParams, TokenChunk
from fabric.workload import WORKLOADS, Workload, generate, workload

DECODE_STEPS = 500
PLAN_SEQUENCES = 256
PLAN_CONTEXT = 2000

HELP = """\
Measures engine and worker in this process: no HTTP, no Ray, the same requests as `bench serve`.

examples:
  fabric bench engine
  fabric bench engine --workload chat decode --concurrency 1 32 --json engine.json"""


class Subject(Protocol):
    """An engine with its worker, as `fabric.driver.LLM` is one."""

    def add(self, request: Request) -> None:
        """Queue a request."""
        ...

    def step(self) -> list[TokenChunk]:
        """One turn: schedule, execute, commit."""
        ...

    def weight_bytes(self) -> int:
        """What a step has to read at least."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What is measured. `plan_cost_s`: seconds of Python for each of some decode steps of that
    many sequences at that context."""

    load: Callable[[], Subject]
    read_bytes_per_s: Callable[[], float]
    plan_cost_s: Callable[[int, int], list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """Output tokens a second, and the median time to the first token of a request."""

    output_tokens: int
    seconds: float
    ttft_ms_p50: float

    @property
    def tokens_per_s(self) -> float:
        """Throughput."""
        return self.output_tokens / self.seconds


def run(words: Sequence[str], bench: Bench) -> int:
    """Measure, print, and write the record if asked. The exit code."""
    arguments = _parser().parse_args(words)
    subject = bench.load()
    record: dict[str, object] = {}
    if not arguments.no_floor:
        decode_ms = decode_step_ms(subject)
        floor_ms = 1e3 * subject.weight_bytes() / bench.read_bytes_per_s()
        plan_ms = 1e3 * statistics.median(bench.plan_cost_s(PLAN_SEQUENCES, PLAN_CONTEXT))
        record |= {"decode_ms": decode_ms, "floor_ms": floor_ms, "plan_ms": plan_ms}
        print(
            f"a token at batch 1, schedule to commit: {decode_ms:.2f} ms (median), "
            f"{decode_ms / floor_ms:.2f} times the weight-read floor of {floor_ms:.2f} ms\n"
            f"schedule + tensors + commit of {PLAN_SEQUENCES} sequences at context {PLAN_CONTEXT}: "
            f"{plan_ms:.2f} ms",
            flush=True,
        )
    rows = [["workload", "c", "tok/s", "TTFT p50 ms"]]
    for name in arguments.workload:
        for level in arguments.concurrency:
            found = closed_loop(subject, workload(name), level, arguments.seed)
            rows.append([name, str(level), f"{found.tokens_per_s:.1f}", f"{found.ttft_ms_p50:.1f}"])
            record[f"{name} c={level}"] = {
                "tokens_per_s": found.tokens_per_s,
                "ttft_ms_p50": found.ttft_ms_p50,
            }
    print(align(rows))
    if arguments.json:
        write_json(arguments.json, record)
    return 0


def decode_step_ms(subject: Subject) -> float:
    """Median wall time of a turn that decodes one sequence, in ms, after a few to warm up."""
    sampling = SamplingParams(max_tokens=DECODE_STEPS + 20, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(1000, 1032))
    subject.add(Request(request_id="decode", prompt=prompt, sampling=sampling, arrival=0))
    for _ in range(19):
        subject.step()
    times_s = []
    over = False
    while not over:
        began = time.perf_counter()
        chunks = subject.step()
        times_s.append(time.perf_counter() - began)
        over = chunks[0].finish is not None
    return 1e3 * statistics.median(times_s)


def closed_loop(subject: Subject, shape: Workload, concurrency: int, seed: str) -> ClosedLoop:
    """`concurrency` requests are always under way, until all have ended; a warm-up comes first."""
    warm_up = generate(shape, count=min(concurrency, 4), seed=f"{seed}/warm-up")
    drain(subject, list(warm_up), concurrency)
    requests = generate(shape, count=default_requests(concurrency), seed=seed)
    return drain(subject, list(requests), concurrency)


def drain(subject: Subject, requests: Sequence[Request], concurrency: int) -> ClosedLoop:
    """Nothing but the closed loop: these requests, `concurrency` under way, until all ended."""
    waiting = iter(requests)
    began = time.perf_counter()
    added: dict[str, float] = {}
    ttft_s: list[float] = []

    def add_next() -> bool:
        request = next(waiting, None)
        if request is not None:
            added[request.request_id] = time.perf_counter()
            subject.add(request)
        return request is not None

    running = sum(add_next() for _ in range(concurrency))
    tokens = 0
    while running:
        chunks = subject.step()
        now = time.perf_counter()
        for chunk in chunks:
            tokens += len(chunk.tokens)
            if chunk.position == 0:
                ttft_s.append(now - added[chunk.request_id])
            if chunk.finish is not None:
                running += add_next() - 1
    return ClosedLoop(
        output_tokens=tokens,
        seconds=time.perf_counter() - began,
        ttft_ms_p50=1e3 * statistics.median(ttft_s),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fabric bench engine",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = tuple(one.name for one in WORKLOADS)
    parser.add_argument(
        "--workload",
        nargs="+",
        choices=names,
        default=["chat"],
        metavar="NAME",
        help=f"of {', '.join(names)} (default: chat)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="requests under way at once (default: 1 8 32)",
    )
    parser.add_argument("--seed", default="0", help="of all draws (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--no-floor", action="store_true", help="only the closed loops, not the costs of a step"
    )
    return parser
