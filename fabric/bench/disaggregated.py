"""`fabric bench disaggregated`: long prompts among running chats, in pools and in mixed replicas.

chats    ─────128 → 128─────▶  ITL of these is what counts
prompts  ──1024 → 32──▶        they arrive among the chats, at their own rate

The same requests at the same times go to two mixed replicas, with each chunk size of the sweep,
and to a prefill and a decode replica: two engine processes of one thread each, either way. An open
loop, so that the throughput is the same unless a server falls behind; the table says when it does.
Before the load, long prompts are asked for one at a time: what the hand-over itself costs.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fabric.bench.client import Client, Endpoint
from fabric.bench.load import open_loop
from fabric.bench.report import align, machine, write_json
from fabric.bench.server import Server, configured
from fabric.bench.stats import Sample, summarize
from fabric.bench.verdict import Target, Verdict, folder_of
from fabric.core.request import Request
from fabric.workload import Arrivals, generate, workload

ITL_TARGET = 0.5  # of the best colocated chunk size's p99
GAP_TARGET_MS = 40.0  # from token 1 to token 2, over an idle mixed replica's
THROUGHPUT_KEPT = 0.95  # less of what was offered to the best: not an equal throughput
READY_WITHIN_S = 180.0
POOLS = "disaggregated"
LEAST_DETOUR = 64  # chats too: no prompt is computed among decodes

HELP = """\
Starts servers in turn: two mixed replicas with each chunk size, then a prefill and a decode
replica, one thread each; sends each the same chats and 1,024-token prompts. Prints the chats' ITL,
TTFT, the gap between token 1 and token 2, and where disaggregation loses.

examples:
  fabric bench disaggregated
  fabric bench disaggregated --chunks 16 32 64 128 256 512 1024 --seconds 60"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every server is sent; rates in requests a second, `idle` prompts one at a time."""

    seconds: float
    chat_rate: float
    prompt_rate: float
    idle: int
    seed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One server's figures; times in ms. `bytes_received`: of KV, 0 where nothing is handed over.

    `idle_ttft_ms`, `idle_gap_ms`: medians of a long prompt that has the server to itself.
    """

    name: str
    chat_itl_p50_ms: float
    chat_itl_p99_ms: float
    chat_ttft_p50_ms: float
    prompt_ttft_p50_ms: float
    output_tok_s: float
    idle_ttft_ms: float
    idle_gap_ms: float
    bytes_received: int
    received_bytes_s: float
    errors: int


def settings(chunks: Sequence[int]) -> list[tuple[str, dict[str, Any]]]:
    """Names and configurations: the colocated sweep, then the pools."""
    model = {"name": "demo", "threads": 1}
    mixed = [
        (f"chunk {size}", {"model": model, "replicas": 2, "engine": {"chunk_tokens": size}})
        for size in chunks
    ]
    pools = {
        "prefill": {"chunk_tokens": 256},
        "decode": {"chunk_tokens": 64},
        "min_prompt_tokens": LEAST_DETOUR,
    }
    return [*mixed, (POOLS, {"model": model, "pools": pools})]


def run(arguments: argparse.Namespace) -> int:
    """Measure every setting, print the table and the verdicts; 1 when a target is missed."""
    load = Load(
        seconds=arguments.seconds,
        chat_rate=arguments.chat_rate,
        prompt_rate=arguments.prompt_rate,
        idle=arguments.idle,
        seed=arguments.seed,
    )
    path = arguments.json or folder_of(None) / "disaggregated.json"
    print(machine())
    outcomes = []
    for name, config in settings(arguments.chunks):
        file = path.parent / f"{name.replace(' ', '-')}.yaml"
        with Server(configured(file, config, READY_WITHIN_S)) as server:
            outcomes.append(asyncio.run(_measure(server, name, load)))
        print(f"  {name}: ITL p99 {outcomes[-1].chat_itl_p99_ms:.0f} ms", flush=True)
        write_json(path, {"load": asdict(load), "outcomes": [asdict(one) for one in outcomes]})
    print(table(outcomes))
    verdict = Verdict(targets=verdicts(outcomes))
    print(verdict.text())
    print("\n".join(losses(outcomes)))
    print(f"all figures: {path}")
    return verdict.exit_code


def table(outcomes: Sequence[Outcome]) -> str:
    """A line a server."""
    head = "server,ITL p50,ITL p99,chat TTFT,prompt TTFT,tok/s,idle TTFT,idle gap,KV MB/s,errors"
    rows = [head.split(",")]
    for one in outcomes:
        figures = (
            *(one.chat_itl_p50_ms, one.chat_itl_p99_ms, one.chat_ttft_p50_ms),
            *(one.prompt_ttft_p50_ms, one.output_tok_s, one.idle_ttft_ms, one.idle_gap_ms),
            one.received_bytes_s / 1e6,
        )
        rows.append([one.name, *(f"{value:.1f}" for value in figures), str(one.errors)])
    return align(rows)


def verdicts(outcomes: Sequence[Outcome]) -> list[Target]:
    """(target, found, met)."""
    best, pools = best_and_pools(outcomes)
    ratio = pools.chat_itl_p99_ms / best.chat_itl_p99_ms
    gap_ms = pools.idle_gap_ms - best.idle_gap_ms
    equal = pools.output_tok_s >= THROUGHPUT_KEPT * best.output_tok_s
    errors = sum(one.errors for one in outcomes)
    return [
        (
            f"chats' ITL p99 at most {ITL_TARGET}x of {best.name}",
            f"{ratio:.2f}x",
            ratio <= ITL_TARGET,
        ),
        (
            f"token 1 to 2, idle: at most {GAP_TARGET_MS:.0f} ms over a mixed replica's",
            f"{gap_ms:+.1f} ms",
            gap_ms <= GAP_TARGET_MS,
        ),
        (
            f"throughput at least {THROUGHPUT_KEPT:.0%}",
            f"{pools.output_tok_s:.1f} of {best.output_tok_s:.1f} tok/s",
            equal,
        ),
        ("no request failed", f"{errors} did", not errors),
    ]


def best_and_pools(outcomes: Sequence[Outcome]) -> tuple[Outcome, Outcome]:
    """The best chunk size: the lowest ITL p99 among those that kept the throughput."""
    mixed = [one for one in outcomes if one.name != POOLS]
    (pools,) = [one for one in outcomes if one.name == POOLS]
    most = max(one.output_tok_s for one in mixed)
    keeping = [one for one in mixed if one.output_tok_s >= THROUGHPUT_KEPT * most]
    return min(keeping, key=lambda one: one.chat_itl_p99_ms), pools


def losses(outcomes: Sequence[Outcome]) -> list[str]:
    """Every figure in which the pools lose."""
    best, pools = best_and_pools(outcomes)
    compared = (
        ("chat ITL p50", pools.chat_itl_p50_ms, best.chat_itl_p50_ms),
        ("chat ITL p99", pools.chat_itl_p99_ms, best.chat_itl_p99_ms),
        ("chat TTFT p50", pools.chat_ttft_p50_ms, best.chat_ttft_p50_ms),
        ("prompt TTFT p50", pools.prompt_ttft_p50_ms, best.prompt_ttft_p50_ms),
        ("idle TTFT", pools.idle_ttft_ms, best.idle_ttft_ms),
        ("idle gap", pools.idle_gap_ms, best.idle_gap_ms),
    )
    return [
        f"loses: {name} {got:.1f} ms, colocated {other:.1f}"
        for name, got, other in compared
        if got > other
    ]


def add_to(commands: Any) -> None:
    """The subcommand's flags."""
    command = commands.add_parser(
        "disaggregated",
        help="chats among long prompts: pools against mixed replicas",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--chunks", type=int, nargs="+", default=[16, 64, 256], metavar="N", help="of the sweep")
    add("--seconds", type=float, default=60.0, metavar="S", help="of arrivals (default: 60)")
    add("--chat-rate", type=float, default=0.3, metavar="R", help="a second (default: 0.3)")
    add("--prompt-rate", type=float, default=0.1, metavar="R", help="a second (default: 0.1)")
    add("--idle", type=int, default=3, metavar="N", help="prompts one at a time (default: 3)")
    add("--seed", default="0", help="of all draws (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="(default: bench-results/disaggregated.json)")


async def _measure(server: Server, name: str, load: Load) -> Outcome:
    endpoint = Endpoint(url=server.launch.url, model=server.model)
    client = Client(endpoint)
    try:
        idle = [
            await client.complete(endpoint.wire(one), one, time.monotonic_ns())
            for one in generate(workload("prefill"), count=load.idle + 1, seed=f"{load.seed}/idle")
        ][1:]  # the first one warms up
        jobs = [(endpoint.wire(one), one) for one in arrivals(load)]
        samples = await open_loop(client, jobs)
        counts = server.handover_counts()
        moved = counts.get("bytes_received", 0.0), counts.get("seconds_receiving", 0.0)
    finally:
        await client.close()
    return outcome(name, load.seconds, idle, samples, moved)


def arrivals(load: Load) -> list[Request]:
    """Chats and long prompts in the order of their arrival, at least one of each."""
    found: list[Request] = []
    for name, rate in (("chat", load.chat_rate), ("prefill", load.prompt_rate)):
        count = max(1, round(load.seconds * rate))
        paced = Arrivals(rate_per_s=rate)
        made = generate(workload(name), count=count, seed=f"{load.seed}/{name}", arrivals=paced)
        found += [replace(one, request_id=f"{name}-{one.request_id}") for one in made]
    return sorted(found, key=lambda one: one.arrival)


def outcome(
    name: str,
    load_s: float,
    idle: Sequence[Sample],
    samples: Sequence[Sample],
    moved: tuple[float, float],
) -> Outcome:
    """The figures of one server; `moved`: bytes of KV that arrived and the seconds that it took.

    Throughput is that from the first request to the last token, however soon that came after the
    `load_s` seconds of arrivals: who lags behind takes longer. Cut off at their end instead, it
    would be that much less where a first token takes longer, at the same pace.

    Raises ConnectionError where no chat or no prompt came to its end.
    """
    good = [one for one in samples if one.error is None]
    began = min(one.due for one in samples)
    times = [one for sample in good for one in sample.times]
    taken_s = max(load_s, (max(times, default=began) - began) / 1e9)
    long = [one for one in good if one.wanted_tokens == workload("prefill").output.median]
    chats = [one for one in good if one.wanted_tokens != workload("prefill").output.median]
    alone = [one for one in idle if one.error is None and len(one.times) > 1]
    if not (long and chats and alone):
        raise ConnectionError(f"{name}: no answers to measure: {[o.error for o in samples][:3]}")
    of_chats, of_prompts = summarize(chats), summarize(long)
    assert of_chats.itl_ms and of_chats.ttft_ms and of_prompts.ttft_ms
    return Outcome(
        name=name,
        chat_itl_p50_ms=of_chats.itl_ms.p50,
        chat_itl_p99_ms=of_chats.itl_ms.p99,
        chat_ttft_p50_ms=of_chats.ttft_ms.p50,
        prompt_ttft_p50_ms=of_prompts.ttft_ms.p50,
        output_tok_s=len(times) / taken_s,
        idle_ttft_ms=statistics.median(one.ttft_ms for one in alone),
        idle_gap_ms=statistics.median((one.times[1] - one.times[0]) / 1e6 for one in alone),
        bytes_received=int(moved[0]),
        received_bytes_s=moved[0] / moved[1] if moved[1] else 0.0,
        errors=sum(one.error is not None for one in (*idle, *samples)),
    )
