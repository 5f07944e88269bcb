"""`fabric serve` as a user starts it: a process, its terminal output, its HTTP port, its end."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.source import ROOT

from fabric.cluster.processes import Descendant, alive, descendants

START_TIMEOUT_S = 180
STOP_TIMEOUT_S = 60


class FabricServer:
    """A running server. `output` is what it has printed so far. `key`: the API key that is shown
    where a request shows none."""

    def __init__(self, arguments: list[str], folder: Path, key: str | None = None) -> None:
        self._key = key
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"serve-{self.port}.log"
        command = [sys.executable, "-m", "fabric.cli", "serve", "--port", str(self.port)]
        with self.log.open("w") as log:
            # A session of its own: a signal to its group reaches what a terminal's Ctrl-C reaches.
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: set[Descendant] = set()

    @property
    def output(self) -> str:
        """Everything printed so far."""
        return self.log.read_text()

    def wait_until_ready(self) -> FabricServer:
        """Until the URL is printed."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Serving " not in self.output:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        self.processes()
        return self

    def processes(self) -> list[Descendant]:
        """Everything that it has started; remembered for `left_over`."""
        found = descendants(self.process.pid)
        self.seen.update(found)
        return found

    def left_over(self) -> list[int]:
        """Processes that it started and that still run."""
        return [one.pid for one in self.seen if alive(one)]

    def signal(self, number: int) -> None:
        """SIGINT to the launcher's whole group, as a terminal's Ctrl-C goes; others to it alone."""
        self.processes()
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)

    def wait(self) -> int:
        """Its exit code."""
        return self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """End it, by force if need be."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self.process.kill()
        for pid in self.left_over():
            os.kill(pid, signal.SIGKILL)

    def get(self, path: str) -> Answer:
        """GET."""
        return self._ask(urllib.request.Request(self.url + path))

    def post(self, path: str, body: object, **headers: str) -> Answer:
        """POST as JSON."""
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json", **headers}
        return self._ask(urllib.request.Request(self.url + path, data, headers))

    def metrics(self) -> dict[str, float]:
        """Series with labels -> value."""
        lines = self.get("/metrics").text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
        return {series: float(value) for series, value in pairs}

    def gauge(self, name: str) -> float:
        """The sum over all series of a name."""
        values = [v for series, v in self.metrics().items() if re.match(rf"{name}(\{{|$)", series)]
        assert values, f"no series {name}"
        return sum(values)

    def _ask(self, request: urllib.request.Request) -> Answer:
        if self._key and not request.has_header("Authorization"):
            request.add_header("authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, dict(answer.headers), answer.read().decode())
        except urllib.error.HTTPError as error:
            return Answer(error.code, dict(error.headers), error.read().decode())


class Answer:
    """An HTTP response."""

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.text = text

    def json(self) -> Any:
        """The body."""
        return json.loads(self.text)


@contextmanager
def serving(folder: Path, *arguments: str, key: str | None = None) -> Iterator[FabricServer]:
    """A server that is ready. At the end Ctrl-C, as a user does it: exit code 0, no traceback, and
    all of its processes gone."""
    server = FabricServer(list(arguments), folder, key)
    try:
        yield server.wait_until_ready()
        server.signal(signal.SIGINT)
        assert server.wait() == 0, server.output
        assert not server.left_over(), server.output
        assert "Traceback" not in server.output
    finally:
        server.stop()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def eventually(condition: Any, *, within_s: float = 30.0) -> None:
    """Wait until `condition()` holds; fails with its last value."""
    deadline = time.monotonic() + within_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {within_s} s"
        time.sleep(0.1)
