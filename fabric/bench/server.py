"""One server under measurement: started, waited for, stopped with all its children."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import httpx

POLL_S = 0.2
STOP_S = 45.0
KILL_S = 5.0
LOG_TAIL_BYTES = 2_000


class ServerError(Exception):
    """A server under measurement did not come up; says what its log ends with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How to start a server. `variables` are set on top of the inherited environment."""

    name: str
    command: tuple[str, ...]
    port: int
    variables: Mapping[str, str]
    log: Path
    ready_within_s: float

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"


def configured(path: Path, config: Mapping[str, Any], ready_within_s: float) -> Launch:
    """fabric on the demo model with this configuration, which is written to `path`; its log lies
    beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config) + "\n", encoding="utf-8")  # JSON is YAML
    port = free_port()
    command = (sys.executable, "-m", "fabric.cli", "serve", "--config", str(path))
    return Launch(
        name="fabric",
        command=(*command, "--port", str(port)),
        port=port,
        variables={},
        log=path.with_suffix(".log"),
        ready_within_s=ready_within_s,
    )


class Server:
    """A context manager: within, the server answers with tokens; afterwards it is gone.

    It leads its own session, so that Ctrl-C in the terminal reaches only us; we stop it, and
    whatever it started, by pid. SIGTERM ends us within too, but not before that.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.model = ""
        self.ready_after_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: Any = signal.SIG_DFL

    def __enter__(self) -> Server:
        """Start it and wait for its first token. Raises `ServerError`. In the main thread only."""
        self._before = signal.signal(signal.SIGTERM, _leave)
        self.launch.log.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        # `env` sets the variables: this package does not read the environment.
        settings = [f"{name}={value}" for name, value in self.launch.variables.items()]
        with self.launch.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["/usr/bin/env", *settings, *self.launch.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait(started + self.launch.ready_within_s)
        except BaseException:
            self.stop()
            raise
        self.ready_after_s = time.monotonic() - started
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def stop(self) -> None:
        """SIGTERM, time to drain, then SIGKILL to what is left of its tree."""
        if self._process is None:
            return
        tree = process_tree(self._process.pid)
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        tree |= process_tree(self._process.pid)
        _kill_what_is_left(tree)
        self._process.wait(KILL_S)
        self._process = None
        signal.signal(signal.SIGTERM, self._before)

    def memory_bytes(self) -> int:
        """Memory of all its processes, shared pages divided among their users (PSS)."""
        assert self._process is not None
        return sum(_pss_bytes(pid) for pid, _ in process_tree(self._process.pid))

    def cpu_s(self) -> float:
        """CPU seconds that its processes have used, with those of children that ended."""
        assert self._process is not None
        return sum(_cpu_s(pid) for pid, _ in process_tree(self._process.pid))

    def handover_counts(self) -> dict[str, float]:
        """What its replicas have counted of KV that went from one to another, added up."""
        answer = httpx.get(f"{self.launch.url}/fabric/status", timeout=60, trust_env=False)
        found: dict[str, float] = {}
        for row in answer.raise_for_status().json()["replicas"]:
            for name, value in (row.get("handover") or {}).items():
                found[name] = found.get(name, 0.0) + value
        return found

    def _wait(self, deadline: float) -> None:
        assert self._process is not None
        with httpx.Client(timeout=60, trust_env=False) as http:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise ServerError(f"{self.launch.name} ended while starting:\n{self._tail()}")
                with contextlib.suppress(httpx.HTTPError, LookupError, ValueError):
                    if self._answers(http):
                        return
                time.sleep(POLL_S)
        waited = f"{self.launch.ready_within_s:.0f} s"
        raise ServerError(f"{self.launch.name} gave no token within {waited}:\n{self._tail()}")

    def _answers(self, http: httpx.Client) -> bool:
        model = http.get(self.launch.url + "/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "prompt": "One two three", "max_tokens": 2, "temperature": 0}
        http.post(self.launch.url + "/v1/completions", json=body).raise_for_status()
        self.model = str(model)
        return True

    def _tail(self) -> str:
        text = self.launch.log.read_bytes()[-LOG_TAIL_BYTES:].decode("utf-8", "replace")
        return f"{text}\n(the whole log: {self.launch.log})"


def _leave(number: int, _frame: FrameType | None) -> None:
    """By an exception, so that servers are stopped on the way."""
    raise SystemExit(128 + number)


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def process_tree(root: int) -> set[tuple[int, int]]:
    """(pid, start time) of a process, all below it and all of the session that it leads.

    The session finds children whose parent is gone. A pid alone may be someone else's by now.
    """
    facts = {
        int(folder.name): found
        for folder in Path("/proc").iterdir()
        if folder.name.isdigit() and (found := _facts(int(folder.name)))
    }
    tree, todo = set(), [root]
    todo += [pid for pid, found in facts.items() if found.session == root]
    while todo:
        pid = todo.pop()
        if pid in facts and (pid, facts[pid].started) not in tree:
            tree.add((pid, facts[pid].started))
            todo += [child for child, found in facts.items() if found.parent == pid]
    return tree


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """Of a live process; `started` in clock ticks since boot."""

    parent: int
    session: int
    started: int


def _facts(pid: int) -> _Facts | None:
    try:
        fields: Sequence[str] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    if fields[0] == "Z":
        return None
    return _Facts(parent=int(fields[1]), session=int(fields[3]), started=int(fields[19]))


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended a moment ago
        return 0
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(int(ticks) for ticks in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def machine_cpu_s() -> float:
    """CPU seconds that the machine was busy since boot, with what its hypervisor took away."""
    user, nice, system, _, _, irq, softirq, stolen = (
        int(ticks) for ticks in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    )
    ticks = user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Who had used how much CPU at `taken`, all in seconds."""

    taken: float
    machine: float
    known: float  # server and client

    @classmethod
    def now(cls, server: Server | None = None) -> Usage:
        """Until now."""
        known = time.process_time() + (server.cpu_s() if server else 0.0)
        return cls(taken=time.monotonic(), machine=machine_cpu_s(), known=known)

    def others_until_now(self, server: Server | None = None) -> float:
        """CPUs that other processes kept busy since."""
        now = Usage.now(server)
        others = (now.machine - self.machine) - (now.known - self.known)
        return max(0.0, others / (now.taken - self.taken))


def _kill_what_is_left(tree: set[tuple[int, int]]) -> None:
    for pid, start in tree:
        facts = _facts(pid)
        if facts is not None and facts.started == start:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
