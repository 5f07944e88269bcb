"""`fabric bench`: its subcommands, their flags and what they print."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fabric.bench import cold_start, disaggregated, prefix_fetch, routing
from fabric.bench.address import EXAMPLE, server_address
from fabric.bench.client import Endpoint, find_model, takes_token_ids
from fabric.bench.comparison import OURS, Plan, Visit, alternate, ratio_rows
from fabric.bench.load import Cell, default_requests, run_cell
from fabric.bench.peers import PeerMissing, Setting, launch
from fabric.bench.report import Measured, align, machine, markdown, measured_table, write_json
from fabric.bench.server import ServerError
from fabric.bench.stats import Targets
from fabric.workload import WORKLOADS, Arrivals, workload

ALL_WORKLOADS = tuple(one.name for one in WORKLOADS)
DEFAULT_LEVELS = (1, 8, 32)
QUICK_SCALE = 0.5
# `fabric.cli` hands these to parsers of their own, before this one; it names them in its help.
ELSEWHERE: Mapping[str, str] = {
    "engine": "the engine alone, in this process",
    "fidelity": "what the simulator foretells of a trace, beside our own live server",
    "front": "what HTTP and Ray Serve cost: the same engine with and without, in turns",
    "journal": "what a journal costs a step, in this process",
    "simulator": "the simulator's speed against real time, in this process",
    "tiers": "preemption between tiers: engine and worker, in this process",
}

TOP_HELP = """\
Measures; `fabric bench COMMAND --help` tells more.

  fabric bench serve            a running server, at several concurrencies or rates
  fabric bench peers            fabric and vLLM on the same requests, in turns
  fabric bench engine           the engine alone: no HTTP, no Ray"""

SERVE_HELP = """\
Measures a running server: any OpenAI-compatible endpoint that streams.

Closed loop (--concurrency): that many requests are always under way; shows capacity.
Open loop (--rate): requests arrive by a Poisson process whether or not earlier ones are done;
shows what users feel. Latencies then count from the arrival.

workloads (prompt → output tokens; seeded, the same for every server):
  chat     128 → 128          decode   32 → 256         prefill  1024 → 32
  prefix   1024 shared by all + 32 → 64; the first request finds it cold
  mixed    log-normal, median 256 (sigma 0.8, 16 to 1024) → median 96 (sigma 0.7, 8 to 384)

examples:
  fabric bench serve
  fabric bench serve --workload chat prefix --concurrency 1 16 64 --json results.json
  fabric bench serve --workload chat --rate 4 --requests 200 --ttft-ms 500 --tpot-ms 50"""

PEERS_HELP = """\
Starts fabric and its peers in turn, sends each the same requests, prints the ratios.

vLLM's CPU build is installed into .venv-vllm the first time (about 2 GB). llama.cpp's server is
used where it is at hand (--peer llama.cpp --gguf FILE). Let the machine do nothing else meanwhile;
what other processes take of its CPUs is measured in each cell, and said where it matters.

examples:
  fabric bench peers                    two rounds of every cell, about 20 minutes on two cores
  fabric bench peers --quick            one round of fewer requests, at concurrency 1 and 8
  fabric bench peers --workload chat --concurrency 32 --rounds 4"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What the benchmark can't know by itself. `model_folder` gets the demo model's folder.

    `others`: benchmarks that need torch and so live elsewhere; name -> what to run with the words
    that follow.
    """

    model_folder: Callable[[], Path]
    api_key: str | None = None
    others: Mapping[str, Callable[[Sequence[str]], int]] = field(default_factory=dict)


def run(words: Sequence[str], surroundings: Surroundings) -> int:
    """Run `fabric bench WORDS...`; the exit code."""
    if words and words[0] in surroundings.others:
        return surroundings.others[words[0]](words[1:])
    arguments = parser((*surroundings.others, *ELSEWHERE)).parse_args(words)
    try:
        if arguments.command == "serve":
            return asyncio.run(_serve(arguments, surroundings.api_key))
        if arguments.command == "cold-start":
            return cold_start.run(arguments, surroundings.api_key)
        if arguments.command == "disaggregated":
            return disaggregated.run(arguments)
        if arguments.command == "prefix-fetch":
            return prefix_fetch.run(arguments)
        if arguments.command == "routing":
            return routing.run(arguments)
        return _peers(arguments, surroundings)
    except (ConnectionError, PeerMissing, ServerError, ValueError) as problem:
        print(f"fabric bench: {problem}", file=sys.stderr)
        return 1


def parser(others: Sequence[str] = ()) -> argparse.ArgumentParser:
    """Every flag of `fabric bench`."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(prog="fabric bench", description=TOP_HELP, formatter_class=raw)
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = commands.add_parser(
        "serve", help="a running server", description=SERVE_HELP, formatter_class=raw
    )
    _add_serve(serve)
    peers = commands.add_parser(
        "peers",
        help="fabric against vLLM and llama.cpp",
        description=PEERS_HELP,
        formatter_class=raw,
    )
    _add_peers(peers)
    cold_start.add_to(commands)
    disaggregated.add_to(commands)
    prefix_fetch.add_to(commands)
    routing.add_to(commands)
    for name in others:
        text = ELSEWHERE.get(name, f"the {name} alone, in this process")
        commands.add_parser(name, help=text, add_help=False)
    return top


def _add_serve(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--url",
        type=server_address,
        default=EXAMPLE,
        help="the server (default: %(default)s); its key comes from FABRIC_API_KEY",
    )
    add("--model", help="the model's name (default: the first that the server lists)")
    _add_workload(command)
    loops = command.add_mutually_exclusive_group()
    _add_concurrency(loops)
    loops.add_argument(
        "--rate", type=float, nargs="+", metavar="R", help="requests per second, one or several"
    )
    add("--variation", type=float, default=1.0, metavar="V", help="of the gaps: 1 Poisson, 0 even")
    add("--requests", type=int, metavar="N", help="requests of a cell (default: by concurrency)")
    add("--ttft-ms", type=float, metavar="MS", help="target for goodput: time to first token")
    add("--tpot-ms", type=float, metavar="MS", help="target for goodput: time per output token")
    add("--e2e-ms", type=float, metavar="MS", help="target for goodput: the whole answer")
    add(
        "--prompts",
        choices=("auto", "tokens", "text", "chat"),
        default="auto",
        help="send token ids, words, or words as a chat message (default: ids where taken)",
    )
    add("--natural-end", action="store_true", help="don't send ignore_eos; outputs may end early")
    add("--timeout", type=float, default=600.0, metavar="S", help="of one request (default: 600)")
    _add_seed_and_json(command)


def _add_peers(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add(
        "--peer",
        nargs="+",
        default=["vllm"],
        metavar="NAME",
        help="vllm, llama.cpp (default: vllm)",
    )
    add("--only-peers", action="store_true", help="leave fabric itself out")
    _add_workload(command)
    _add_concurrency(command)
    add("--rounds", type=int, metavar="N", help="(default: 2; with --quick 1)")
    add("--quick", action="store_true", help="one round, half the requests, concurrency 1 and 8")
    add("--model", type=Path, metavar="FOLDER", help="the model (default: the demo model)")
    add("--llama-server", default="llama-server", metavar="PATH", help="llama.cpp's server binary")
    add("--gguf", type=Path, metavar="FILE", help="the same model in bf16, for llama.cpp")
    add("--markdown", type=Path, metavar="FILE", help="write the table as Markdown, too")
    _add_seed_and_json(command)


def _add_workload(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workload",
        nargs="+",
        choices=ALL_WORKLOADS,
        default=ALL_WORKLOADS,
        metavar="NAME",
        help="which (default: all)",
    )


def _add_concurrency(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        metavar="N",
        help="requests under way at once, one or several (default: 1 8 32)",
    )


def _add_seed_and_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", default="0", help="of all draws (default: %(default)s)")
    command.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where all figures go (default: bench-results/COMMAND.json)",
    )


async def _serve(arguments: argparse.Namespace, api_key: str | None) -> int:
    endpoint = await _endpoint(arguments, api_key)
    given = (arguments.ttft_ms, arguments.tpot_ms, arguments.e2e_ms)
    targets = None
    if any(limit is not None for limit in given):
        targets = Targets(ttft_ms=given[0], tpot_ms=given[1], e2e_ms=given[2])
    print(f"{endpoint.url}, model {endpoint.model}, prompts as {endpoint.prompts}")
    results = []
    for cell in _cells(arguments):
        summary = await run_cell(endpoint, cell, targets)
        results.append(Measured(cell=cell, summary=summary))
        print(f"  {cell.workload.name} {cell.load}: {summary.output_tok_s:.1f} tok/s", flush=True)
    print(measured_table(results))
    path = arguments.json or Path("bench-results/serve.json")
    record = {
        "model": endpoint.model,
        "prompts": endpoint.prompts,
        "targets": asdict(targets) if targets else None,
        "cells": [one.record() for one in results],
    }
    write_json(path, record)
    print(f"all figures: {path}")
    return 1 if any(one.summary.errors for one in results) else 0


async def _endpoint(arguments: argparse.Namespace, api_key: str | None) -> Endpoint:
    model = arguments.model or await find_model(arguments.url, api_key)
    endpoint = Endpoint(
        url=arguments.url,
        model=model,
        prompts="tokens" if arguments.prompts == "auto" else arguments.prompts,
        exact=not arguments.natural_end,
        api_key=api_key,
        timeout_s=arguments.timeout,
    )
    if arguments.prompts == "auto" and not await takes_token_ids(endpoint):
        return replace(endpoint, prompts="text")
    return endpoint


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    """One cell for each workload at each level of load."""
    shapes = [workload(name) for name in arguments.workload]
    if arguments.rate:
        return [
            Cell(
                workload=shape,
                requests=arguments.requests or max(16, round(30 * rate)),
                seed=f"{arguments.seed}/r-{rate:g}",
                arrivals=Arrivals(rate_per_s=rate, variation=arguments.variation),
            )
            for shape in shapes
            for rate in arguments.rate
        ]
    return [
        Cell(
            workload=shape,
            requests=arguments.requests or default_requests(level),
            seed=f"{arguments.seed}/c-{level}",
            concurrency=level,
        )
        for shape in shapes
        for level in arguments.concurrency or DEFAULT_LEVELS
    ]


def _peers(arguments: argparse.Namespace, surroundings: Surroundings) -> int:
    path = arguments.json or Path("bench-results/peers.json")
    setting = Setting(
        model=arguments.model or surroundings.model_folder(),
        home=Path.cwd(),
        results=path.parent,
        threads=os.cpu_count() or 1,
        llama_server=arguments.llama_server,
        gguf=arguments.gguf,
    )
    names = [] if arguments.only_peers else [OURS]
    launches = tuple(launch(name, setting) for name in (*names, *arguments.peer))
    quick = arguments.quick
    plan = Plan(
        workloads=tuple(arguments.workload),
        concurrencies=tuple(
            arguments.concurrency or (DEFAULT_LEVELS[:2] if quick else DEFAULT_LEVELS)
        ),
        rounds=arguments.rounds or (1 if quick else 2),
        seed=arguments.seed,
        scale=QUICK_SCALE if quick else 1.0,
    )
    print(machine())
    visits: list[Visit] = []
    for visit in alternate(launches, plan, lambda text: print(text, flush=True)):
        visits.append(visit)
        rows = ratio_rows(visits)
        record = {"plan": asdict(plan), "table": rows, "visits": [v.record() for v in visits]}
        write_json(path, record)  # after each visit: an interruption keeps what was measured
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows) + "\n", encoding="utf-8")
    print(align(rows))
    print("TTFT: p50. Ratios: how many times better fabric is. !: errors or wrong output lengths.")
    if disturbed := sum(one.disturbed for visit in visits for one in visit.cells):
        print(f"{disturbed} measurements were disturbed by other processes; don't quote this run")
    print(f"all figures: {path}")
    return 0
