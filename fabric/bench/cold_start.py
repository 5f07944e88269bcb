"""`fabric bench cold-start`: what the first request costs after a server has gone to zero replicas.

idle server ── waits until no replica is left ── one request ── first token ── the same, warm

From arrival to first token: Serve starts a process, it loads the model, the request is computed.
Loading is what the replica says it took; what is left is the price of having been at zero.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from fabric.bench.address import EXAMPLE, server_address
from fabric.bench.report import align

POLL_S = 0.5
TARGET_S = 4.0

HELP = """\
Measures a cold start from zero replicas. The server must run with autoscaling and min_replicas 0;
with a short autoscaling.idle_s there is less to wait for.

examples:
  fabric serve --config deployments/autoscaling.yaml
  fabric bench cold-start --starts 3"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One cold start; seconds. `load_s`: of the model, as the replica measured it."""

    cold_ttft_s: float
    load_s: float
    warm_ttft_s: float

    @property
    def rest_s(self) -> float:
        """What neither loading nor computing explains."""
        return self.cold_ttft_s - self.load_s - self.warm_ttft_s


class Server:
    """A running server's HTTP side. Raises `ConnectionError`, worded for a person."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url
        self._timeout_s = timeout_s
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False)

    def status(self) -> dict[str, Any]:
        """The record of `/fabric/status`."""
        try:
            record: dict[str, Any] = self._http.get("/fabric/status").raise_for_status().json()
        except (httpx.HTTPError, ValueError) as problem:
            raise ConnectionError(
                f"{self.url}/fabric/status: {type(problem).__name__}; is a fabric server there?"
            ) from None
        if not record.get("scaling"):
            raise ConnectionError(f"{self.url} runs without autoscaling: it never has no replica")
        return record

    def wait_for_zero(self) -> None:
        """Until no replica is left of a server that is ready; one that starts has none yet."""
        deadline = time.monotonic() + self._timeout_s
        while (record := self.status())["replicas"] or not record["ready"]:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"still a replica after {self._timeout_s:.0f} s: is min_replicas 0, and "
                    "idle_s shorter than --timeout?"
                )
            time.sleep(POLL_S)

    def ttft_s(self) -> float:
        """Seconds to the first event of a stream."""
        body = {"prompt": "The capital of France is", "max_tokens": 4, "stream": True}
        began = time.monotonic()
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as answer:
                answer.raise_for_status()
                next(answer.iter_lines())
                return time.monotonic() - began
        except (httpx.HTTPError, StopIteration) as problem:
            raise ConnectionError(f"the request was lost: {problem}") from None


def add_to(commands: Any) -> None:
    """The subcommand's flags."""
    command = commands.add_parser(
        "cold-start",
        help="the first request after a server has gone to zero",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--url", type=server_address, default=EXAMPLE, help="the server (default: %(default)s)"
    )
    command.add_argument("--starts", type=int, default=3, metavar="N", help="(default: 3)")
    command.add_argument(
        "--timeout", type=float, default=900.0, metavar="S", help="of each wait (default: 900)"
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")


def run(arguments: argparse.Namespace, api_key: str | None) -> int:
    """Measure, print; 1 when a start took longer than the target."""
    server = Server(arguments.url, api_key, arguments.timeout)
    starts = []
    for _ in range(arguments.starts):
        server.wait_for_zero()
        cold_s = server.ttft_s()
        warm_s = min(server.ttft_s() for _ in range(3))
        (row, *_) = server.status()["replicas"]
        starts.append(Start(cold_ttft_s=cold_s, load_s=row["load_s"], warm_ttft_s=warm_s))
        print(f"cold start {len(starts)}: {cold_s:.2f} s", flush=True)
    print(table(starts))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in starts], indent=2) + "\n")
    return 0 if all(one.rest_s <= TARGET_S for one in starts) else 1


def table(starts: list[Start]) -> str:
    """One line a start, and the verdict."""
    rows = [["start", "first token s", "model load s", "warm s", "rest s"]]
    for number, one in enumerate(starts, start=1):
        figures = (one.cold_ttft_s, one.load_s, one.warm_ttft_s, one.rest_s)
        rows.append([str(number), *(f"{value:.2f}" for value in figures)])
    met = all(one.rest_s <= TARGET_S for one in starts)
    verdict = "met" if met else "MISSED"
    return f"{align(rows)}\n{verdict}: at most {TARGET_S:.0f} s beside loading the model"
