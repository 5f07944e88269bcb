"""A Ray cluster over `kit.hosts`: a node a host, started and ended by pid."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.fabric_server import Answer
from kit.hosts import Host, hosts, tool
from kit.source import ROOT

from fabric.cluster.node import environment

GCS_PORT, HTTP_PORT = 6379, 8000
START_TIMEOUT_S = 120.0
HTTP_TIMEOUT_S = 60.0
STORE_BYTES = 100 << 20


class RayCluster:
    """Host 0 is the head, without CPU slots: engines go to the others."""

    def __init__(self, members: list[Host], folder: Path, *, cpus: int, **extra: str) -> None:
        self.hosts = members
        self.head = members[0]
        self.address = f"{self.head.address}:{GCS_PORT}"
        self.folder = folder
        self._cpus = cpus
        private = folder / "node"
        private.mkdir(exist_ok=True)
        self.environment = {
            **environment(private),
            "RAY_AUTH_MODE": "disabled",
            "PYTHONPATH": str(ROOT),
            # A busy machine is no broken one.
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_health_check_initial_delay_ms": "20000",
            **extra,
        }

    def start_node(
        self, host: Host, *, dashboard: bool = False, block: bool = True
    ) -> subprocess.Popen[bytes]:
        """`ray start`; returns at once. With `block` it stays, and ends all of the node's
        processes when one of them ends."""
        is_head = host is self.head
        words = [
            tool("ray"),
            "start",
            *(["--block"] if block else []),
            "--disable-usage-stats",
            f"--node-ip-address={host.address}",
            f"--num-cpus={0 if is_head else self._cpus}",
            f"--object-store-memory={STORE_BYTES}",
            f"--temp-dir={self.temp(host)}",
        ]
        if is_head:
            words += [
                "--head",
                f"--port={GCS_PORT}",
                f"--include-dashboard={'true' if dashboard else 'false'}",
            ]
        else:
            words += [f"--address={self.address}"]
        return host.start(
            *words, log=self.folder / f"{host.name}.log", environment=self.environment
        )

    def temp(self, host: Host) -> Path:
        """Ray's own folder of that host, with its logs."""
        return self.folder / f"ray{self.hosts.index(host)}"

    def wait_for(self, alive: int) -> None:
        """Until so many nodes are alive. Asking takes a second of CPU: not before somebody
        answers, and not all the time."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.head.inside(self._listens):
            assert time.monotonic() < deadline, "no control store"
            time.sleep(0.2)
        while (found := len(self.alive())) != alive:
            assert time.monotonic() < deadline, f"{found} nodes alive, not {alive}"
            time.sleep(1.5)

    def _listens(self) -> bool:
        try:
            socket.create_connection((self.head.address, GCS_PORT), timeout=2).close()
        except OSError:
            return False
        return True

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head takes for alive; none where it does not answer."""
        script = (
            "import ray, sys; from ray._raylet import GcsClient\n"
            f"nodes = GcsClient(address='{self.address}').get_all_node_info(timeout=5)\n"
            "print(*[n.node_manager_address for n in nodes.values() if n.state == 0])"
        )
        done = self.head.run(
            tool("python"), "-c", script, environment=self.environment, check=False
        )
        return done.stdout.split() if done.returncode == 0 else []

    def fabric(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """The command `fabric`, on the head."""
        return self.head.run(
            tool("python"),
            "-m",
            "fabric.cli",
            *words,
            environment=self.environment,
            timeout_s=240,
            check=check,
        )

    def deploy(self, config: Path, *words: str, check: bool = True) -> str:
        """`fabric deploy`; what it says."""
        done = self.fabric("deploy", str(config), "--address", self.address, *words, check=check)
        return done.stdout

    def status(self) -> dict[str, Any]:
        """`fabric status --address`."""
        done = self.fabric("status", "--address", self.address, "--json", check=False)
        found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
        return found

    def ask(self, path: str, body: object | None = None) -> Answer:
        """See `ask_at`, on the head."""
        return ask_at(self.head, path, body)


def ask_at(host: Host, path: str, body: object | None = None) -> Answer:
    """HTTP over a host's own loopback; status 0 where nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{HTTP_PORT}{path}", data, {"content-type": "application/json"}
    )

    def send() -> Answer:
        try:
            with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read().decode())
        except OSError as error:
            return Answer(0, {}, str(error))

    return host.inside(send)


@contextmanager
def ray_cluster(
    count: int, folder: Path, *, cpus: int = 1, dashboard: bool = False, **extra: str
) -> Iterator[RayCluster]:
    """A head and `count` - 1 nodes of `cpus` slots each, all alive. `folder`: short-named, since
    Ray puts Unix sockets there. `extra`: environment of every node."""
    with hosts(count) as members:
        cluster = RayCluster(members, folder, cpus=cpus, **extra)
        cluster.start_node(cluster.head, dashboard=dashboard)
        cluster.wait_for(1)
        for host in members[1:]:
            cluster.start_node(host)
        cluster.wait_for(count)
        yield cluster
