"""Kills at random moments under a crowd of streams, each compared with an undisturbed run.

One round: the crowd starts, the seed says when and what is killed, everybody reads to the end. Then
every stream must be what it was without the kill, and every gauge must be at rest. When is a share
of the text that has been read, not a time: that hits work at any speed.
"""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import repeat
from random import Random
from typing import Any

from kit.fabric_server import FabricServer, eventually

from fabric.cluster.processes import PROC

CROWD = 14
STREAM_TIMEOUT_S = 240
BACK_WITHIN_S = 180.0
AT_REST = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "fabric_requests_swapped",
    "fabric_open_requests",
    "fabric_open_handovers",
    "fabric_queue_requests",
)

Kill = Callable[[FabricServer, Random], None]


@dataclass(slots=True)
class Stream:
    """What one client got: text of each choice, their ends, and the usage that came last."""

    text: dict[int, str] = field(default_factory=dict)
    finish: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    error: str = ""

    @property
    def letters(self) -> int:
        """How much of it has been read."""
        return sum(map(len, list(self.text.values())))


def crowd(seed: int) -> list[dict[str, Any]]:
    """Requests of every kind: greedy and seeded, penalties, choices, stop strings, logprobs."""
    dice = Random(seed)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": seed},
        {"temperature": 0.9, "seed": 3, "frequency_penalty": 0.6, "repetition_penalty": 1.2},
        {"temperature": 1.0, "seed": 5, "n": 2},
        {"temperature": 1.2, "seed": 7, "stop": ["ox", "the "], "min_tokens": 40},
        {"temperature": 0.0, "logprobs": 2},
    ]
    words = "the quick brown fox jumps over lazy dogs and hello world tell me what".split()
    return [
        {
            "model": "m",
            "prompt": " ".join(dice.choice(words) for _ in range(dice.randint(3, 220))),
            "max_tokens": dice.randint(60, 260),
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **kinds[number % len(kinds)],
        }
        for number in range(CROWD)
    ]


def read(server: FabricServer, body: dict[str, Any], found: Stream) -> None:
    """One stream to its end, into `found`."""
    request = urllib.request.Request(
        server.url + "/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=STREAM_TIMEOUT_S) as answer:
        for line in answer:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                found.error = event["error"]["message"]
                break
            for choice in event["choices"]:
                index = choice["index"]
                assert index not in found.finish or not choice["text"], "text after the end"
                found.text[index] = found.text.get(index, "") + choice["text"]
                if choice["finish_reason"]:
                    found.finish[index] = choice["finish_reason"]
            if event.get("usage"):
                found.tokens = event["usage"]["completion_tokens"]


class Rounds:
    """Rounds against one server. `phases`: in which a request was when something was killed."""

    def __init__(self, server: FabricServer, seed: int) -> None:
        self.server = server
        self.bodies = crowd(seed)
        self.undisturbed = self._all()
        self.letters = sum(one.letters for one in self.undisturbed)
        assert not any(one.error for one in self.undisturbed), self.undisturbed
        self.replicas = self._live()
        self.phases: set[str] = set()
        self.kills = 0

    def kill_once(self, seed: int, kill: Kill) -> None:
        """One round. Fails with the seed in hand (it is the test's parameter)."""
        dice = Random(seed)
        before = self._admitted()
        found = [Stream() for _ in self.bodies]
        with ThreadPoolExecutor(CROWD) as pool:
            readers = list(map(pool.submit, repeat(read), repeat(self.server), self.bodies, found))
            # New requests get a 503 while no replica is there: all of these shall be in.
            eventually(lambda: self._admitted() - before == CROWD)
            self._wait_for(dice.random() * 0.8, found)
            self.phases |= self._met()
            kill(self.server, dice)
            assert not all(reader.done() for reader in readers), "all was over before the kill"
            self.kills += 1
            for reader in readers:
                reader.result()
        for number, (got, wanted) in enumerate(zip(found, self.undisturbed, strict=True)):
            assert got == wanted, f"stream {number} of seed {seed}: {got} instead of {wanted}"
        eventually(lambda: self._live() == self.replicas, within_s=BACK_WITHIN_S)
        eventually(self._at_rest, within_s=30.0)

    def _wait_for(self, share: float, streams: list[Stream]) -> None:
        """Until that share of the undisturbed text has been read."""
        deadline = time.monotonic() + STREAM_TIMEOUT_S
        while sum(one.letters for one in streams) < share * self.letters:
            assert time.monotonic() < deadline, f"{share:.0%} of the text did not come"
            time.sleep(0.01)

    def _admitted(self) -> float:
        return self.server.gauge("fabric_requests_admitted_total")

    def _live(self) -> int:
        """Replicas that can be given requests."""
        if self.server.get("/ready").status != 200:
            return 0
        found = self.server.get("/fabric/status").json()["replicas"]
        return sum(not one["error"] and all(map(_lives, _pids(one))) for one in found)

    def _all(self) -> list[Stream]:
        found = [Stream() for _ in self.bodies]
        with ThreadPoolExecutor(CROWD) as pool:
            list(pool.map(read, repeat(self.server), self.bodies, found))
        return found

    def _met(self) -> set[str]:
        """By the gauges of this moment."""
        gauges = {
            "queued": "fabric_queue_requests",
            "prefill": "fabric_waiting_tokens",
            "handing over": "fabric_open_handovers",
            "swapped": "fabric_requests_swapped",
            "decode": "vllm:num_requests_running",
        }
        metrics = self.server.metrics()
        busy = {series.split("{")[0] for series, value in metrics.items() if value > 0}
        return {phase for phase, name in gauges.items() if name in busy}

    def _at_rest(self) -> bool:
        metrics = self.server.metrics()

        def total(name: str) -> float:
            return sum(v for series, v in metrics.items() if series.split("{")[0] == name)

        blocks = total("fabric_kv_blocks") == total("fabric_kv_blocks_free") > 0
        host = total("fabric_host_blocks") == total("fabric_host_blocks_free")
        return blocks and host and not any(total(name) for name in AT_REST)


def kill_replica(server: FabricServer, dice: Random) -> None:
    """An engine replica's process."""
    replicas = server.get("/fabric/status").json()["replicas"]
    os.kill(dice.choice(sorted(one["pid"] for one in replicas)), signal.SIGKILL)


def kill_worker(server: FabricServer, dice: Random) -> None:
    """One worker of a group."""
    os.kill(dice.choice(_workers(server)), signal.SIGKILL)


def hang_worker(server: FabricServer, dice: Random) -> None:
    """One worker of a group stands still."""
    os.kill(dice.choice(_workers(server)), signal.SIGSTOP)


def _pids(replica: dict[str, Any]) -> list[int]:
    """Of a replica and its workers."""
    return [replica["pid"], *(shard["pid"] for shard in replica["shards"])]


def _lives(pid: int) -> bool:
    return (PROC / str(pid)).exists()


def _workers(server: FabricServer) -> list[int]:
    replicas = server.get("/fabric/status").json()["replicas"]
    return sorted(shard["pid"] for one in replicas for shard in one["shards"])
