"""fabric against its peers: the same cells on each server, in alternation, and the ratios.

One server is up at a time (an idle neighbour is not idle: Ray's daemons and spinning thread pools
take their share of two cores). Round 1 goes through the servers in order, round 2 backwards, and
so on, so that a machine that gets slower or faster in between favours nobody; a cell's figure is
the median over the rounds.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fabric.bench.client import Endpoint
from fabric.bench.load import Cell, default_requests, run_cell
from fabric.bench.report import Measured
from fabric.bench.server import Launch, Server, Usage
from fabric.workload import workload

OURS = "fabric"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run. `scale` multiplies the number of requests of a cell."""

    workloads: tuple[str, ...]
    concurrencies: tuple[int, ...]
    rounds: int
    seed: str
    scale: float = 1.0

    def cells(self, number: int) -> list[Cell]:
        """The cells of one round: equal for all servers, with prompts that no other cell has."""
        return [
            Cell(
                workload=workload(name),
                requests=default_requests(concurrency, self.scale),
                seed=f"{self.seed}/round-{number}/c-{concurrency}",
                concurrency=concurrency,
            )
            for name in self.workloads
            for concurrency in self.concurrencies
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One server's turn in one round. `memory_bytes`: PSS of all its processes at the end."""

    peer: str
    round: int
    ready_after_s: float
    memory_bytes: int
    cells: tuple[Measured, ...]

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "peer": self.peer,
            "round": self.round,
            "ready_after_s": round(self.ready_after_s, 1),
            "memory_bytes": self.memory_bytes,
            "cells": [cell.record() for cell in self.cells],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Medians over the rounds of one server in one cell. `sound`: no errors, all lengths exact."""

    output_tok_s: float
    ttft_ms_p50: float
    ttft_ms_p99: float
    tpot_ms_p50: float
    sound: bool


def alternate(
    launches: Sequence[Launch], plan: Plan, say: Callable[[str], None]
) -> Iterator[Visit]:
    """Run all rounds, a visit at a time. Raises `ServerError` if a server does not come up."""
    for number in range(plan.rounds):
        order = launches if number % 2 == 0 else tuple(reversed(launches))
        for launch in order:
            say(f"round {number + 1} of {plan.rounds}: starting {launch.name}")
            with Server(launch) as server:
                say(f"  ready after {server.ready_after_s:.1f} s")
                cells = tuple(_measure(server, cell, say) for cell in plan.cells(number))
                memory = server.memory_bytes()
                say(f"  {memory / 1e9:.2f} GB in all its processes, KV pool included")
            yield Visit(
                peer=launch.name,
                round=number,
                ready_after_s=server.ready_after_s,
                memory_bytes=memory,
                cells=cells,
            )


def _measure(server: Server, cell: Cell, say: Callable[[str], None]) -> Measured:
    endpoint = Endpoint(url=server.launch.url, model=server.model)
    used = Usage.now(server)
    summary = asyncio.run(run_cell(endpoint, cell))
    measured = Measured(cell=cell, summary=summary, others=used.others_until_now(server))
    first = f"{summary.ttft_ms.p50:.0f} ms" if summary.ttft_ms else "-"
    wrong = f", {dict(summary.errors)}" if summary.errors else ""
    if measured.disturbed:
        wrong += f", disturbed: other processes took {measured.others:.1f} CPUs"
    say(
        f"  {cell.workload.name:8} {cell.load:5} {summary.output_tok_s:8.1f} tok/s, "
        f"TTFT {first}, {summary.duration_s:.0f} s{wrong}"
    )
    return measured


def figures(visits: Sequence[Visit], peer: str, name: str, load: str) -> Figures | None:
    """A server's medians in a cell; None if it never finished a request there."""
    found = [
        cell.summary
        for visit in visits
        if visit.peer == peer
        for cell in visit.cells
        if (cell.cell.workload.name, cell.cell.load) == (name, load)
    ]
    if not found or any(one.ttft_ms is None for one in found):
        return None
    first = [one.ttft_ms for one in found if one.ttft_ms]
    return Figures(
        output_tok_s=statistics.median(one.output_tok_s for one in found),
        ttft_ms_p50=statistics.median(spread.p50 for spread in first),
        ttft_ms_p99=statistics.median(spread.p99 for spread in first),
        tpot_ms_p50=statistics.median(one.tpot_ms.p50 if one.tpot_ms else 0.0 for one in found),
        sound=not any(one.errors or one.off_length for one in found),
    )


def ratio_rows(visits: Sequence[Visit]) -> list[list[str]]:
    """Heads and one row a cell: each server's figures, and fabric's advantage over each peer.

    Both ratios say how many times better fabric is: its tok/s over the peer's, the peer's TTFT p50
    over its own. A figure with errors or wrong lengths behind it is marked `!`.
    """
    names = list(dict.fromkeys(visit.peer for visit in visits))
    peers = [name for name in names if name != OURS]
    heads = ["workload", "load"]
    heads += [f"{name} tok/s" for name in names] + [f"{name} TTFT ms" for name in names]
    if OURS in names:
        heads += [f"{what} × {peer}" for peer in peers for what in ("tok/s", "TTFT")]
    rows = [heads]
    cells = [(cell.cell.workload.name, cell.cell.load) for visit in visits for cell in visit.cells]
    for name, load in dict.fromkeys(cells):
        got = {peer: figures(visits, peer, name, load) for peer in names}
        row = [name, load, *(_rate(got[peer]) for peer in names)]
        row += [_first(got[peer]) for peer in names]
        if OURS in names:
            for peer in peers:
                row += _ratios(got[OURS], got[peer])
        rows.append(row)
    return rows


def _rate(one: Figures | None) -> str:
    return "-" if one is None else f"{one.output_tok_s:.0f}" + ("" if one.sound else " !")


def _first(one: Figures | None) -> str:
    return "-" if one is None else f"{one.ttft_ms_p50:.0f}"


def _ratios(ours: Figures | None, theirs: Figures | None) -> list[str]:
    if ours is None or theirs is None:
        return ["-", "-"]
    rate = ours.output_tok_s / theirs.output_tok_s
    first = theirs.ttft_ms_p50 / ours.ttft_ms_p50
    return [f"{rate:.2f}", f"{first:.2f}"]
