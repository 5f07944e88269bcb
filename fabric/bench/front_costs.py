"""What HTTP and Ray Serve add to the steps of an engine: three constants, for the simulator.

Asked of a live server and compared with a table that was measured in process: short requests alone
and in waves of like ones, whose steps all decode, and prompts alone. None of them is like a trace.
The waves take turns: a machine that is slower for some seconds is so for all of them.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fabric.bench.client import Endpoint
from fabric.bench.load import send
from fabric.bench.server import Server, ServerError
from fabric.bench.stats import Sample
from fabric.bench.step_table import Table, plain_request
from fabric.core.request import Request

WARM = 3  # waves that don't count: what Ray and Serve still do after a start is none of a step's
ROUNDS = 3
WAVES = (1, 4, 8, 32)  # rows
PROMPT, OUTPUT = 16, 48
FIRST_PROMPT, FIRSTS = 128, 9
PACE_ROWS, PACE_PROMPT, PACE_PROMPTS = 8, 256, 3
NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontCosts:
    """In ns, beside what `Table` says: of a request before its first token, of a step, and of each
    row that gets a token in it."""

    first_ns: int
    step_ns: int
    row_ns: int

    def times(self, pace: float) -> FrontCosts:
        """Of a machine on which everything takes so many times as long."""
        first, step, row = (round(ns * pace) for ns in (self.first_ns, self.step_ns, self.row_ns))
        return FrontCosts(first_ns=first, step_ns=step, row_ns=row)

    def render(self) -> str:
        """For a terminal."""
        first, step, row = (ns / NS_PER_MS for ns in (self.first_ns, self.step_ns, self.row_ns))
        return (
            f"HTTP and Ray Serve: {first:.2f} ms of a first token, "
            f"{step:.2f} ms of a step and {row:.3f} ms of each row in it"
        )


def measure_front(server: Server, table: Table) -> FrontCosts:
    """Half a minute of requests. Raises `ServerError` if one of them fails."""
    endpoint = Endpoint(url=server.launch.url, model=server.model)
    for number in range(WARM):
        _ask(endpoint, _wave(f"warm/{number}", 8, PROMPT, OUTPUT))
    context = PROMPT + OUTPUT / 2
    found: dict[int, list[float]] = {rows: [] for rows in WAVES}
    for number in range(ROUNDS):
        for rows, times in found.items():
            times.append(_step_ns(endpoint, rows, f"{rows}/{number}"))
    step_ns, row_ns = line_through(
        [
            (rows, statistics.median(times) - table.decode_ns(rows, context))
            for rows, times in found.items()
        ]
    )
    alone = [
        _ask(endpoint, _wave(f"first/{number}", 1, FIRST_PROMPT, 1))[0].ttft_ms * NS_PER_MS
        for number in range(FIRSTS)
    ]
    first_ns = statistics.median(alone) - table.prompt_ns(FIRST_PROMPT) - step_ns - row_ns
    return FrontCosts(
        first_ns=max(0, round(first_ns)), step_ns=round(step_ns), row_ns=round(row_ns)
    )


def pace_of(endpoint: Endpoint, table: Table, front: FrontCosts, name: str) -> float:
    """How long the machine takes just now for what the two say: a wave and some prompts alone, over
    what they should take. Four seconds. Raises `ServerError`."""
    context = PROMPT + OUTPUT / 2
    step_ns = table.decode_ns(PACE_ROWS, context) + front.step_ns + PACE_ROWS * front.row_ns
    alone_ns = table.prompt_ns(PACE_PROMPT) + front.first_ns + front.step_ns + front.row_ns
    wave_ns = _step_ns(endpoint, PACE_ROWS, f"pace/{name}")
    prompts = [
        _ask(endpoint, _wave(f"pace/{name}/{number}", 1, PACE_PROMPT, 1))[0].ttft_ms * NS_PER_MS
        for number in range(PACE_PROMPTS)
    ]
    return (wave_ns / step_ns + statistics.median(prompts) / alone_ns) / 2


def line_through(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """(at no rows, a row more), least squares; neither below zero: a front saves no time."""
    slope, constant = statistics.linear_regression(*zip(*points, strict=True))
    if slope < 0:
        return max(0.0, statistics.fmean(ns for _, ns in points)), 0.0
    if constant < 0:
        squares = sum(rows * rows for rows, _ in points)
        return 0.0, max(0.0, sum(rows * ns for rows, ns in points) / squares)
    return constant, slope


def _step_ns(endpoint: Endpoint, rows: int, name: str) -> float:
    """A step in which so many rows decode, as their clients see it: the median TPOT."""
    samples = _ask(endpoint, _wave(name, rows, PROMPT, OUTPUT))
    return statistics.median(one.tpot_ms or 0.0 for one in samples) * NS_PER_MS


def _wave(name: str, count: int, prompt: int, output: int) -> list[Request]:
    salt = sum(ord(letter) * 131**place for place, letter in enumerate(name))
    return [
        plain_request(f"front/{name}/{index}", prompt, output, salt + index)
        for index in range(count)
    ]


def _ask(endpoint: Endpoint, requests: list[Request]) -> list[Sample]:
    samples = asyncio.run(send(endpoint, requests))
    for one in samples:
        if one.error is not None:
            raise ServerError(f"while HTTP was measured: {one.error}")
    return samples
