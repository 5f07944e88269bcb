"""Runs one cell: warm-up, then an open or a closed loop of requests against an endpoint."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fabric.bench.client import Client, Endpoint
from fabric.bench.stats import Sample, Summary, Targets, summarize
from fabric.core.request import Request
from fabric.workload import Arrivals, Workload, generate

MAX_IN_FLIGHT = 1024  # an open loop's bound; latencies count from the arrival all the same
WARM_UP_TOKENS = 8

# How many requests make a cell, per unit of concurrency: enough waves for a steady figure, few
# enough for a comparison of all cells to end within the half hour.
_WAVES = ((2, 6.0), (4, 4.0), (16, 3.0), (1 << 30, 2.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measurement: a workload and `concurrency` (closed loop) or `arrivals` (open loop).

    Equal cells send equal requests, whatever the server.
    """

    workload: Workload
    requests: int
    seed: str
    concurrency: int | None = None
    arrivals: Arrivals | None = None

    def __post_init__(self) -> None:
        if (self.concurrency is None) == (self.arrivals is None):
            raise ValueError("a cell has either a concurrency or arrivals")
        if self.requests < 1 or (self.concurrency is not None and self.concurrency < 1):
            raise ValueError("a cell needs at least one request and a concurrency of at least 1")

    @property
    def load(self) -> str:
        """`c=8` or `2.5/s`."""
        if self.arrivals is not None:
            return f"{self.arrivals.rate_per_s:g}/s"
        return f"c={self.concurrency}"


def default_requests(concurrency: int, scale: float = 1.0) -> int:
    """The number of requests of a closed-loop cell, never below the concurrency."""
    waves = next(waves for limit, waves in _WAVES if concurrency <= limit)
    return max(concurrency, math.ceil(concurrency * waves * scale))


async def run_cell(endpoint: Endpoint, cell: Cell, targets: Targets | None = None) -> Summary:
    """Warm up, measure, summarize. The warm-up shares no prompt with what is measured."""
    client = Client(endpoint)
    try:
        await _warm_up(client, endpoint, cell)
        requests = generate(
            cell.workload, count=cell.requests, seed=cell.seed, arrivals=cell.arrivals
        )
        jobs = [(endpoint.wire(request), request) for request in requests]
        if cell.concurrency is not None:
            samples = await _closed_loop(client, iter(jobs), cell.concurrency)
        else:
            samples = await open_loop(client, jobs)
    finally:
        await client.close()
    return summarize(samples, targets)


async def send(
    endpoint: Endpoint, requests: Sequence[Request], concurrency: int | None = None
) -> list[Sample]:
    """These requests without a warm-up: each at its arrival (ns from now), or so many at once."""
    client = Client(endpoint)
    jobs = [(endpoint.wire(request), request) for request in requests]
    try:
        if concurrency is not None:
            return await _closed_loop(client, iter(jobs), concurrency)
        return await open_loop(client, jobs)
    finally:
        await client.close()


def warm_up_requests(cell: Cell) -> list[Request]:
    """One wave of prompts of the cell's own kind with short outputs."""
    width = min(cell.concurrency or 4, 32)
    requests = generate(cell.workload, count=width, seed=f"{cell.seed}/warm-up")
    return [
        replace(request, sampling=replace(request.sampling, max_tokens=WARM_UP_TOKENS))
        for request in requests
    ]


async def _warm_up(client: Client, endpoint: Endpoint, cell: Cell) -> None:
    """That wave at once: opens connections, too."""
    short = warm_up_requests(cell)
    await _closed_loop(client, ((endpoint.wire(one), one) for one in short), len(short))


async def _closed_loop(
    client: Client, jobs: Iterator[tuple[bytes, Request]], concurrency: int
) -> list[Sample]:
    samples: list[Sample] = []

    async def one_after_the_other() -> None:
        for wire, request in jobs:
            samples.append(await client.complete(wire, request, time.monotonic_ns()))

    await asyncio.gather(*(one_after_the_other() for _ in range(concurrency)))
    return samples


async def open_loop(client: Client, jobs: list[tuple[bytes, Request]]) -> list[Sample]:
    """Send each at its arrival (ns from now), whether or not earlier ones are done."""
    room = asyncio.Semaphore(MAX_IN_FLIGHT)
    start = time.monotonic_ns()

    async def one(wire: bytes, request: Request) -> Sample:
        async with room:
            return await client.complete(wire, request, start + request.arrival)

    tasks = []
    async with asyncio.TaskGroup() as group:
        for wire, request in jobs:
            early_ns = start + request.arrival - time.monotonic_ns()
            await asyncio.sleep(max(0.0, early_ns / 1e9))
            tasks.append(group.create_task(one(wire, request)))
    return [task.result() for task in tasks]
