"""`fabric bench routing`: is the work even over three replicas of the demo model, live?

The same question as `fabric simulate routing` asks of 64 in the simulator: the same lengths and as
many prefixes a replica, a server for each policy in turn, the same requests at the same instants.
What the first server can do of the mix is measured first, and sets the rate. Which replica served a
request, and how long it waited for its first step, its answer says; how many are open on each is
read once a second from `/metrics`.

By default more comes than the replicas can do: where they keep up, round robin on three is even too
and what is left is chance (`fabric simulate routing` asks of a full fleet as well).

A replica has one thread. With three on two cores a step takes longer than alone, for all policies
alike; what is compared is how even the replicas are.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from fabric.bench.client import Endpoint
from fabric.bench.load import send
from fabric.bench.report import align, machine, write_json
from fabric.bench.server import Server, ServerError, Usage, configured
from fabric.bench.stats import NS_PER_MS, Sample, summarize
from fabric.bench.verdict import Target, Verdict, folder_of
from fabric.workload import read_mix
from fabric.workload.evenness import Evenness, Served, evenness, mean_of, verdicts

REPLICAS = 3
POLICIES = ("cost", "round_robin", "affinity")
CAPACITY_REQUESTS = 90
CAPACITY_AT_ONCE = 36
LEFT_OUT = 0.25
SAMPLE_S = 1.0
READY_WITHIN_S = 300.0
KV: Mapping[str, int] = {"device_bytes": 384 << 20, "host_bytes": 64 << 20}
# A server that falls behind must not turn requests away: all policies serve the same.
ADMISSION: Mapping[str, float] = {"queue_ttl_s": 3600.0}
_OPEN = re.compile(
    r'^vllm:num_requests_(?:running|waiting)\{[^}]*replica="([^"]+)"[^}]*\} (\S+)$', re.MULTILINE
)

HELP = """\
Three replicas of the demo model, a heavy-tailed mix (fabric/workloads), a server for each routing
policy in turn: how even waits, queues and latencies are over replicas, and what is found in caches,
against the targets. Takes about eight minutes on two cores.

examples:
  fabric bench routing
  fabric bench routing --seeds 3 --seconds 240 --json routing.json"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One policy, one seed. `requests` that were judged; `tokens_per_s` of output; `others`: CPUs
    that other processes took."""

    policy: str
    seed: str
    requests: int
    tokens_per_s: float
    others: float
    evenness: Evenness


def add_to(commands: Any) -> None:
    """The subcommand's flags."""
    command = commands.add_parser(
        "routing",
        help="is the work even over three replicas of the demo model",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--workload", default="heavy_tailed_three", metavar="NAME", help="(%(default)s)")
    add("--seconds", type=float, default=100.0, metavar="S", help="of arrivals (default: 100)")
    add("--load", type=float, default=1.2, metavar="F", help="of what was measured (default: 1.2)")
    add("--rate", type=float, metavar="R", help="requests a second, in place of --load")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each policy (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print; 1 when a target was missed. Raises `ServerError`, `ValueError`."""
    mix = read_mix(arguments.workload)
    folder = folder_of(arguments.json)
    print(machine(), flush=True)
    rate: float | None = arguments.rate
    runs: list[Run] = []
    for policy in POLICIES:
        config = {
            "replicas": REPLICAS,
            "model": {"threads": 1},
            "router": {"policy": policy},
            "kv": KV,
            "admission": ADMISSION,
        }
        launch = configured(folder / f"routing-{policy}.yaml", config, READY_WITHIN_S)
        with Server(launch) as server:
            if rate is None:
                first = mix.generate(count=CAPACITY_REQUESTS, seed="capacity", rate_per_s=1.0)
                found = asyncio.run(send(_endpoint(server), first, CAPACITY_AT_ONCE))
                rate = arguments.load * summarize(found).requests_s
                print(f"{arguments.load:g} of what it can do: {rate:.2f} requests/s", flush=True)
            for seed in map(str, range(arguments.seeds)):
                count = round(rate * arguments.seconds)
                requests = mix.generate(count=count, seed=seed, rate_per_s=rate)
                runs.append(_measure(server, policy, seed, requests))
                print(_line(runs[-1]), flush=True)
    verdict = Verdict(targets=_verdicts(runs), others=[one.others for one in runs])
    print(align(_rows(runs)))
    print(verdict.text())
    if arguments.json:
        record = {
            "workload": arguments.workload,
            "rate_per_s": rate,
            "runs": [asdict(one) for one in runs],
            "targets": verdict.records(),
        }
        write_json(arguments.json, record)
    return verdict.exit_code


def open_requests(text: str) -> dict[str, float]:
    """Replica -> requests that run or wait there, from the text of `/metrics`."""
    found: dict[str, float] = {}
    for replica, value in _OPEN.findall(text):
        if not replica.startswith("ingress:"):
            found[replica] = found.get(replica, 0.0) + float(value)
    return found


def judge(samples: Sequence[Sample], depths: Mapping[str, Sequence[float]]) -> Evenness:
    """What the answers after the warm-up say. Raises `ServerError` where one failed, or said not
    where it ran: then the policies have not served the same."""
    later = sorted(samples, key=lambda one: one.due)[int(LEFT_OUT * len(samples)) :]
    served = []
    for one in later:
        if one.error is not None or one.replica is None or one.queue_ms is None:
            raise ServerError(f"a request without an answer: {one.error or 'no replica named'}")
        served.append(
            Served(
                replica=one.replica,
                # A late client is no wait of the server's, but its request was due all the same.
                waited_ms=one.queue_ms + (one.sent - one.due) / NS_PER_MS,
                ttft_ms=one.ttft_ms,
                e2e_ms=one.e2e_ms,
                tokens=one.output_tokens,
                prompt_tokens=one.prompt_tokens,
                cached_tokens=one.cached_tokens,
            )
        )
    return evenness(served, depths)


def _endpoint(server: Server) -> Endpoint:
    return Endpoint(url=server.launch.url, model=server.model)


def _measure(server: Server, policy: str, seed: str, requests: Sequence[Any]) -> Run:
    used = Usage.now(server)
    depths: dict[str, list[float]] = {}
    last_s = requests[-1].arrival / 1e9
    samples = asyncio.run(_load(_endpoint(server), requests, depths, last_s))
    found = summarize(samples)
    return Run(
        policy=policy,
        seed=seed,
        requests=len(samples) - int(LEFT_OUT * len(samples)),
        tokens_per_s=found.output_tok_s,
        others=used.others_until_now(server),
        evenness=judge(samples, depths),
    )


async def _load(
    endpoint: Endpoint, requests: Sequence[Any], depths: dict[str, list[float]], last_s: float
) -> list[Sample]:
    """Send them; meanwhile, after the warm-up and while requests arrive, look at the queues."""
    watcher = asyncio.create_task(_watch(endpoint.url, depths, LEFT_OUT * last_s, last_s))
    try:
        return await send(endpoint, requests)
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _watch(url: str, depths: dict[str, list[float]], begin_s: float, end_s: float) -> None:
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        await asyncio.sleep(begin_s)
        while time.monotonic() < began + end_s:
            text = (await http.get(f"{url}/metrics")).text
            for replica, value in open_requests(text).items():
                depths.setdefault(replica, []).append(value)
            await asyncio.sleep(SAMPLE_S)


def _verdicts(runs: Sequence[Run]) -> Sequence[Target]:
    """Of the means over seeds."""
    mean = {
        policy: mean_of([one.evenness for one in runs if one.policy == policy])
        for policy in POLICIES
    }
    return verdicts(*(mean[policy] for policy in POLICIES))


def _line(one: Run) -> str:
    return (
        f"{one.policy}, seed {one.seed}: {one.requests} requests judged, "
        f"{one.tokens_per_s:.1f} tok/s; other processes took {one.others:.2f} CPUs"
    )


def _rows(runs: Sequence[Run]) -> list[list[str]]:
    rows = [["policy", "seed", "wait cv", "depth cv", "latency spread", "of means", "prefix hits"]]
    rows[0] += ["TTFT p99 ms", "tok/s"]
    for one in runs:
        found = one.evenness
        ratios = (found.wait, found.depth, found.latency, found.mean_latency)
        rows.append([one.policy, one.seed, *(f"{value:.2f}" for value in ratios)])
        rows[-1] += [f"{found.hits:.1%}", f"{found.ttft_ms:.0f}", f"{one.tokens_per_s:.1f}"]
    return rows
