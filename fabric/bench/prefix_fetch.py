"""`fabric bench prefix-fetch`: a prefix fetched from the replica that holds it, or computed again.

    prompt ──> one replica computes it ──> TTFT          two replicas of the demo model, which get
    same   ──> the other one fetches it ─> TTFT          requests in turns

Then what it costs who lends: a chat runs on one replica, and the other one meanwhile fetches what
the first has, or computes as long prompts that nobody has. Both take CPU time from the chat on a
machine of few cores; what a loan takes is in the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fabric.bench.client import Client, Endpoint
from fabric.bench.report import align, machine, write_json
from fabric.bench.server import Server, ServerError, Usage, configured
from fabric.bench.stats import NS_PER_MS, Sample
from fabric.bench.verdict import Target, Verdict, folder_of
from fabric.core.request import Request, SamplingParams
from fabric.workload import Lengths, Workload, generate

READY_WITHIN_S = 300.0
CONFIG: Mapping[str, Any] = {
    "model": {"name": "demo", "threads": 1},
    "replicas": 2,
    "router": {"policy": "round_robin"},
    "kv": {"device_bytes": 384 << 20, "host_bytes": 0, "prefix_fetch": {}},
    "ray": {"object_store_bytes": 256 << 20},
}
OUTPUT = 2
CHAT_TOKENS = 1536  # it runs longer than what happens beside it
ALONE_TOKENS = 128
CHAT_LEAD_S = 1.0
MEET_S = 0.2
STEADY = 8
BESIDE = 4
LONG = 1024

HELP = """\
Two replicas of the demo model, one thread each: time to first token of a prompt whose prefix is
computed, and of the same prompt where it is fetched from the other replica; then the ITL of a chat
on the replica that lends. Takes about two minutes on two cores.

examples:
  fabric bench prefix-fetch
  fabric bench prefix-fetch --tokens 256 512 1024 2048 --prompts 10 --json prefix.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """Prompts of so many tokens and one more: TTFT (ms) computed and fetched, in pairs. `fetched`
    of them, `failed` loans; what came in all. `others`: CPUs that other processes took."""

    tokens: int
    computed_ms: tuple[float, ...]
    fetched_ms: tuple[float, ...]
    fetched: int
    failed: int
    loan_s: float
    bytes_received: float
    others: float

    @property
    def share(self) -> float:
        """The median of fetched over computed, pair by pair."""
        pairs = zip(self.fetched_ms, self.computed_ms, strict=True)
        return statistics.median(fetched / computed for fetched, computed in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """Gaps (ms) between a chat's tokens while so many prompts were taken by the other replica."""

    name: str
    prompts: int
    gaps_ms: tuple[float, ...]
    others: float


def add_to(commands: Any) -> None:
    """The subcommand's flags."""
    command = commands.add_parser(
        "prefix-fetch",
        help="a prefix fetched from another replica, beside computing it again",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--tokens", type=int, nargs="+", default=[512, LONG], metavar="N", help="(512 1024)")
    add("--prompts", type=int, default=6, metavar="N", help="of each length (default: 6)")
    add("--seed", default="0", help="of all draws (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print; 1 when a target was missed. Raises `ServerError`."""
    path = folder_of(arguments.json) / "prefix-fetch.yaml"
    print(machine(), flush=True)
    with Server(configured(path, CONFIG, READY_WITHIN_S)) as server:
        prefixes, beside = asyncio.run(_measure(server, arguments))
    verdict = Verdict(
        targets=verdicts(prefixes),
        others=[*(one.others for one in prefixes), *(one.others for one in beside)],
    )
    print(align(rows(prefixes)))
    print(align(beside_rows(beside)))
    print(verdict.text())
    if arguments.json:
        record = {
            "prefixes": [asdict(one) for one in prefixes],
            "beside": [asdict(one) for one in beside],
            "targets": verdict.records(),
        }
        write_json(arguments.json, record)
    return verdict.exit_code


@dataclass(slots=True, kw_only=True)
class Turns:
    """Two replicas that get requests in turns: a short one makes it the other one's."""

    server: Server
    client: Client
    endpoint: Endpoint
    last: str = ""
    replicas: set[str] = field(default_factory=set)
    fillers: int = 0

    async def meet(self) -> None:
        """Both take turns afterwards: one may still load when the other one answers, and what is
        sent there before Serve knows it goes to the other. Raises `ServerError`."""
        deadline = time.monotonic() + READY_WITHIN_S
        in_turns = 0
        while in_turns < STEADY:
            if time.monotonic() > deadline:
                raise ServerError("the second replica never answers")
            before = self.last
            await self.fill()
            in_turns = in_turns + 1 if self.last != before else 0
            await asyncio.sleep(MEET_S)

    async def ask(self, request: Request, at: str) -> Sample:
        """It goes to that replica. Raises `ServerError`."""
        if self.last == at:
            await self.fill()
        return await self.send(request, at)

    def other(self, replica: str) -> str:
        """The one beside it."""
        (found,) = self.replicas - {replica}
        return found

    async def fill(self) -> None:
        """It is the other one's turn."""
        self.fillers += 1
        await self.send(_request(f"filler {self.fillers}", (self.fillers, 5, 6), 1))

    async def send(self, request: Request, at: str | None = None) -> Sample:
        """To whose turn it is, which must be `at`'s. Raises `ServerError`."""
        wire = self.endpoint.wire(request)
        found = await self.client.complete(wire, request, time.monotonic_ns())
        if found.error is not None or found.replica is None:
            raise ServerError(f"no answer to measure: {found.error or 'no replica named'}")
        self.last = found.replica
        self.replicas.add(found.replica)
        if at is not None and found.replica != at:
            told = f"{request.request_id} went to {found.replica} and not to {at}"
            raise ServerError(f"replicas don't take turns, is somebody else asking? {told}")
        return found


async def _measure(
    server: Server, arguments: argparse.Namespace
) -> tuple[list[Prefix], list[Beside]]:
    endpoint = Endpoint(url=server.launch.url, model=server.model)
    client = Client(endpoint)
    turns = Turns(server=server, client=client, endpoint=endpoint)
    try:
        await turns.meet()
        await _pairs(turns, _prompts(LONG, 1, f"{arguments.seed}/warm-up"))
        prefixes = []
        for tokens in arguments.tokens:
            made = _prompts(tokens, arguments.prompts, arguments.seed)
            prefixes.append(await _prefix(turns, tokens, made))
            print(f"{tokens} tokens: {prefixes[-1].share:.2f}x of computing", flush=True)
        return prefixes, await _beside(turns, arguments)
    finally:
        await client.close()


async def _pairs(turns: Turns, prompts: Sequence[Request]) -> list[tuple[Sample, Sample]]:
    """Each prompt where nobody has it, then at the other replica; who begins alternates."""
    found = []
    for number, one in enumerate(prompts):
        first = sorted(turns.replicas)[number % 2]
        computed = await turns.ask(one, first)
        found.append((computed, await turns.ask(one, turns.other(first))))
    return found


async def _prefix(turns: Turns, tokens: int, prompts: Sequence[Request]) -> Prefix:
    before, used = turns.server.handover_counts(), Usage.now(turns.server)
    pairs = await _pairs(turns, prompts)
    others = used.others_until_now(turns.server)
    after = turns.server.handover_counts()
    grown = {name: after[name] - before.get(name, 0.0) for name in after}
    return Prefix(
        tokens=tokens,
        computed_ms=tuple(one.ttft_ms for one, _ in pairs),
        fetched_ms=tuple(one.ttft_ms for _, one in pairs),
        fetched=sum(one.cached_tokens == tokens for _, one in pairs),
        failed=round(sum(grown[name] for name in grown if name.startswith("loan_failed"))),
        loan_s=grown.get("loan_seconds", 0.0),
        bytes_received=grown.get("bytes_received", 0.0),
        others=others,
    )


async def _beside(turns: Turns, arguments: argparse.Namespace) -> list[Beside]:
    """A chat alone, beside a replica that computes, beside one that fetches from the chat's."""
    lender, borrower = sorted(turns.replicas)
    seed = f"{arguments.seed}/beside"
    count = min(arguments.prompts, BESIDE)
    known = _prompts(LONG, count, f"{seed}/known")
    for one in known:
        await turns.ask(one, lender)
    new = _prompts(LONG, count, f"{seed}/new")
    found = []
    for name, prompts in (("nothing", ()), ("computes", new), ("fetches", known)):
        used = Usage.now(turns.server)
        if turns.last == lender:
            await turns.fill()
        length = CHAT_TOKENS if prompts else ALONE_TOKENS
        (chat,) = _prompts(32, 1, f"{seed}/chat/{name}", length)
        running = asyncio.create_task(turns.send(chat, lender))
        await asyncio.sleep(CHAT_LEAD_S)
        turns.last = lender
        began = time.monotonic_ns()
        for one in prompts:
            await turns.ask(one, borrower)
        ended, last = time.monotonic_ns(), turns.last
        sample = await running
        turns.last = last  # it began before the others
        gaps = gaps_between(sample.times, began, ended if prompts else sample.times[-1])
        others = used.others_until_now(turns.server)
        found.append(Beside(name=name, prompts=len(prompts), gaps_ms=gaps, others=others))
    return found


def gaps_between(times: Sequence[int], begin: int, end: int) -> tuple[float, ...]:
    """Those (ms) between two tokens of which a part lies in [begin, end], all in ns. Raises
    `ServerError`: the stream had ended before."""
    if not times or times[-1] < end:
        raise ServerError("the chat ended before what was to happen beside it")
    return tuple((b - a) / NS_PER_MS for a, b in pairwise(times) if b >= begin and a <= end)


def verdicts(prefixes: Sequence[Prefix]) -> list[Target]:
    """(target, found, met)."""
    asked = sum(len(one.fetched_ms) for one in prefixes)
    fetched, failed = (
        sum(getattr(one, what) for one in prefixes) for what in ("fetched", "failed")
    )
    found = [("each prompt's second turn fetches it", f"{fetched} of {asked}", fetched == asked)]
    found.append(("no loan fails", f"{failed} did", failed == 0))
    for one in prefixes:
        text = f"{one.tokens} tokens: sooner than computed (median of pairs)"
        found.append((text, f"{one.share:.2f}x", one.share < 1))
    return found


def rows(prefixes: Sequence[Prefix]) -> list[list[str]]:
    """Heads and a row a length."""
    table = [["prefix", "computed ms p50", "fetched ms p50", "of it", "loan ms", "KV MB/s", "CPUs"]]
    for one in prefixes:
        loans = max(one.fetched, 1)
        rate = one.bytes_received / one.loan_s / 1e6 if one.loan_s else 0.0
        figures = (
            f"{statistics.median(one.computed_ms):.0f}",
            f"{statistics.median(one.fetched_ms):.0f}",
            f"{one.share:.2f}x",
            f"{one.loan_s / loans * 1e3:.0f}",
            f"{rate:.0f}",
            f"{one.others:.2f}",
        )
        table.append([f"{one.tokens} tokens", *figures])
    return table


def beside_rows(beside: Sequence[Beside]) -> list[list[str]]:
    """The chat's gaps; what each prompt beside it takes from it in all, against the chat alone."""
    usual = statistics.median(beside[0].gaps_ms)
    heads = [
        "the other replica",
        "chat's ITL ms p50",
        "mean",
        "longest",
        "ms lost a prompt",
        "CPUs",
    ]
    table = [heads]
    for one in beside:
        lost = sum(one.gaps_ms) - usual * len(one.gaps_ms)
        figures = (statistics.median(one.gaps_ms), statistics.mean(one.gaps_ms), max(one.gaps_ms))
        each = f"{lost / one.prompts:.0f}" if one.prompts else "-"
        row = [one.name, *(f"{figure:.1f}" for figure in figures), each, f"{one.others:.2f}"]
        table.append(row)
    return table


def _prompts(tokens: int, count: int, seed: str, output: int = OUTPUT) -> list[Request]:
    """So many tokens and one more, which is always computed."""
    shape = Workload(
        name=f"prefix-{tokens}", prompt=Lengths(median=tokens + 1), output=Lengths(median=output)
    )
    return list(generate(shape, count=count, seed=seed))


def _request(name: str, prompt: tuple[int, ...], output: int) -> Request:
    sampling = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    return Request(request_id=name, prompt=prompt, sampling=sampling, arrival=0)
