"""`fabric bench front`: what HTTP and Ray Serve cost, beside the same engine in this process.

Both sides get the same requests, the same warm-up, pools of the same bytes and the same settings
otherwise. They take turns, and who begins a round alternates, so that a machine that gets slower or
faster in between favours nobody. The server is started for its turn and gone afterwards: idle, it
took 0.1 of two CPUs beside the engine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fabric.bench.client import Endpoint
from fabric.bench.engine import Subject, drain
from fabric.bench.load import Cell, run_cell, warm_up_requests
from fabric.bench.report import align, machine, write_json
from fabric.bench.server import Launch, Server, ServerError, Usage, configured
from fabric.bench.verdict import Target, Verdict, folder_of
from fabric.workload import Lengths, generate, workload

KV_BYTES = 1 << 30  # 32 sequences of the longest cell and their prefixes fit
HOST_BYTES = 0  # nothing is preempted
BUSY = 32
FIRST = replace(workload("chat"), name="first token", output=Lengths(median=8))
ROUNDS = 3
READY_WITHIN_S = 300.0
LEAST_SHARE = 0.92
MOST_TTFT_MS = 5.0

HELP = """\
The same engine in this process and behind HTTP and Ray Serve, in turns: chat 128 → 128 and decode
32 → 256 at 32 requests under way, and the first token of a chat alone. A server is started for it.
Takes about a quarter of an hour on two cores, with --quick three minutes (one round, half of it).

examples:
  fabric bench front
  fabric bench front --quick --json front.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What a side made of a cell. `others`: CPUs that other processes took meanwhile; `wrong`:
    failed requests and outputs of a wrong length."""

    tokens_per_s: float
    ttft_ms_p50: float
    others: float
    wrong: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Both sides in one cell of one round. `others`: the CPUs that other processes took, in the
    worse of the two turns."""

    name: str
    concurrency: int
    inside: Figures
    front: Figures
    others: float

    @property
    def share(self) -> float:
        """The front's throughput over the engine's."""
        return self.front.tokens_per_s / self.inside.tokens_per_s

    @property
    def later_ms(self) -> float:
        """By how much the first token comes later through the front (p50)."""
        return self.front.ttft_ms_p50 - self.inside.ttft_ms_p50


Load = Callable[[Mapping[str, Any]], Subject]


def run(words: Sequence[str], load: Load) -> int:
    """Measure, print, write the record if asked; 1 if a target was missed or the server failed.
    `load`: an engine with pools of so many bytes, named as in the configuration's `kv`."""
    arguments = parser().parse_args(words)
    kv = {"device_bytes": KV_BYTES, "host_bytes": HOST_BYTES}
    folder = folder_of(arguments.json)
    print(machine(), flush=True)
    subject = load(kv)
    pairs: list[Pair] = []
    try:
        rounds = 1 if arguments.quick else ROUNDS
        for number in range(rounds):
            each = cells(number, arguments)
            for pair in take_turns(subject, serve(folder, kv), each, front_begins=number % 2 == 1):
                pairs.append(pair)
                print(f"round {number + 1} of {rounds}: {_line(pair)}", flush=True)
    except ServerError as problem:
        print(f"fabric bench: {problem}", file=sys.stderr)
        return 1
    verdict = Verdict(targets=verdicts(pairs), others=[pair.others for pair in pairs])
    print(align(rows(pairs)))
    print(verdict.text())
    if arguments.json:
        record = {
            "kv": kv,
            "seed": arguments.seed,
            "pairs": [asdict(pair) for pair in pairs],
            "targets": verdict.records(),
        }
        write_json(arguments.json, record)
    return verdict.exit_code


def serve(folder: Path, kv: Mapping[str, int], model: str | None = None) -> Launch:
    """A model (the demo one) behind HTTP and Ray Serve, with these pools. Writes its
    configuration."""
    config: dict[str, Any] = {"kv": dict(kv)}
    if model is not None:
        config["model"] = {"source": model}
    return configured(folder / "front.yaml", config, READY_WITHIN_S)


def cells(number: int, arguments: argparse.Namespace) -> list[Cell]:
    """Of one round; no other round has its prompts, so that no prefix is cached."""
    busy = BUSY * (1 if arguments.quick else 2)
    loads = ((workload("chat"), BUSY, busy), (workload("decode"), BUSY, busy), (FIRST, 1, busy))
    return [
        Cell(
            workload=shape,
            requests=requests,
            seed=f"{arguments.seed}/round-{number}/c-{concurrency}",
            concurrency=concurrency,
        )
        for shape, concurrency, requests in loads
    ]


def take_turns(
    subject: Subject, launch: Launch, each: Sequence[Cell], *, front_begins: bool
) -> list[Pair]:
    """All cells on one side, then on the other. Raises `ServerError`."""
    front = _front_turn(launch, each) if front_begins else []
    inside = [in_process(subject, cell) for cell in each]
    front = front or _front_turn(launch, each)
    return [
        Pair(
            name=cell.workload.name,
            concurrency=cell.concurrency or 0,
            inside=ours,
            front=theirs,
            others=max(ours.others, theirs.others),
        )
        for cell, ours, theirs in zip(each, inside, front, strict=True)
    ]


def _front_turn(launch: Launch, each: Sequence[Cell]) -> list[Figures]:
    with Server(launch) as server:
        return [through_front(server, cell) for cell in each]


def in_process(subject: Subject, cell: Cell) -> Figures:
    """A closed loop, after the warm-up that `run_cell` gives a server."""
    used = Usage.now()
    first = warm_up_requests(cell)
    drain(subject, first, len(first))
    requests = list(generate(cell.workload, count=cell.requests, seed=cell.seed))
    found = drain(subject, requests, cell.concurrency or 1)
    return Figures(
        tokens_per_s=found.tokens_per_s,
        ttft_ms_p50=found.ttft_ms_p50,
        others=used.others_until_now(),
    )


def through_front(server: Server, cell: Cell) -> Figures:
    """The same over HTTP. Raises `ServerError` if no request got a token."""
    used = Usage.now(server)
    endpoint = Endpoint(url=server.launch.url, model=server.model)
    found = asyncio.run(run_cell(endpoint, cell))
    if found.ttft_ms is None:
        raise ServerError(f"no request of {cell.workload.name} got a token: {dict(found.errors)}")
    return Figures(
        tokens_per_s=found.output_tok_s,
        ttft_ms_p50=found.ttft_ms.p50,
        others=used.others_until_now(server),
        wrong=found.requests - found.completed + found.off_length,
    )


def verdicts(pairs: Sequence[Pair]) -> list[Target]:
    """(target, found, met). Medians over the rounds of what each pair says."""
    found = []
    for name, concurrency in _loads(pairs):
        those = _of(pairs, name, concurrency)
        if concurrency > 1:
            share = statistics.median(pair.share for pair in those)
            text = f"{name} c={concurrency}: at least {LEAST_SHARE:.0%} of the engine's tok/s"
            found.append((text, f"{share:.1%}", share >= LEAST_SHARE))
        else:
            later = statistics.median(pair.later_ms for pair in those)
            text = f"{name} c={concurrency}: TTFT p50 at most {MOST_TTFT_MS:g} ms later"
            found.append((text, f"{later:+.1f} ms", later <= MOST_TTFT_MS))
    wrong = sum(pair.front.wrong for pair in pairs)
    return [*found, ("all requests served to their full length", f"{wrong} were not", wrong == 0)]


def rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """Heads and a row a cell: medians over the rounds; the ratio and the difference are those of
    pairs, not of the medians beside them."""
    sides = ("in process", "HTTP")
    heads = ["workload", "load", *(f"{side} tok/s" for side in sides), "ratio"]
    heads += [*(f"{side} TTFT p50 ms" for side in sides), "difference", "others' CPUs"]
    table = [heads]
    for name, concurrency in _loads(pairs):
        those = _of(pairs, name, concurrency)
        figures = (
            ("{:.1f}", [pair.inside.tokens_per_s for pair in those]),
            ("{:.1f}", [pair.front.tokens_per_s for pair in those]),
            ("{:.1%}", [pair.share for pair in those]),
            ("{:.1f}", [pair.inside.ttft_ms_p50 for pair in those]),
            ("{:.1f}", [pair.front.ttft_ms_p50 for pair in those]),
            ("{:+.1f}", [pair.later_ms for pair in those]),
            ("{:.2f}", [pair.others for pair in those]),
        )
        cells = (shape.format(statistics.median(values)) for shape, values in figures)
        table.append([name, f"c={concurrency}", *cells])
    return table


def _loads(pairs: Sequence[Pair]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((pair.name, pair.concurrency) for pair in pairs))


def _of(pairs: Sequence[Pair], name: str, concurrency: int) -> list[Pair]:
    return [pair for pair in pairs if (pair.name, pair.concurrency) == (name, concurrency)]


def _line(pair: Pair) -> str:
    return (
        f"{pair.name} c={pair.concurrency}: {pair.front.tokens_per_s:.1f} of "
        f"{pair.inside.tokens_per_s:.1f} tok/s ({pair.share:.1%}), "
        f"TTFT p50 {pair.later_ms:+.1f} ms; other processes took {pair.others:.2f} CPUs"
    )


def parser() -> argparse.ArgumentParser:
    """Its flags."""
    command = argparse.ArgumentParser(
        prog="fabric bench front",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--quick", action="store_true", help="one round of half the requests")
    command.add_argument("--seed", default="0", help="of all draws (default: %(default)s)")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return command
