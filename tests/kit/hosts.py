"""Hosts of a small network on this machine: network namespaces with addresses of their own.

    host 0 (head) ──┐
    host 1 ─────────┼── bridge ── the gateway 10.77.0.1, in a namespace of its own
    host 2 ──── ✂ ──┘   `cut` and `heal` take a link down and up

They share the file system and the process numbers, nothing else: what listens on one host's
loopback can't be reached from another one. Whatever runs on a host is ended with it, by its pid.
Needs root and `ip` (iproute2).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

Result = TypeVar("Result")
CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
GATEWAY = "10.77.0.1"
STOP_TIMEOUT_S = 20.0


class Host:
    """One of them."""

    def __init__(self, name: str, address: str, bridge: str) -> None:
        self.name = name
        self.address = address
        self._bridge = bridge

    @property
    def port(self) -> str:
        """Its end at the bridge."""
        return f"v{self.address.rpartition('.')[2]}"

    def command(self, *words: str) -> list[str]:
        """`words` as they run on this host."""
        return ["ip", "netns", "exec", self.name, *words]

    def start(
        self, *words: str, log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """A process here, in a session of its own; its output goes to the end of `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                self.command(*words),
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(
        self,
        *words: str,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 120.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """A process here, to its end; both outputs together in `stdout`."""
        done = subprocess.run(
            self.command(*words),
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{' '.join(words)}:\n{done.stdout}"
        return done

    def inside(self, function: Callable[[], Result]) -> Result:
        """Call it on a thread whose sockets are this host's."""
        found: list[Result] = []
        failed: list[BaseException] = []

        def enter() -> None:
            try:
                with (NAMESPACES / self.name).open() as namespace:
                    libc = ctypes.CDLL(None, use_errno=True)
                    assert libc.setns(namespace.fileno(), CLONE_NEWNET) == 0
                found.append(function())
            except BaseException as error:  # noqa: BLE001 - raised again below
                failed.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def pids(self) -> list[int]:
        """Everything that runs here."""
        found = subprocess.run(
            ["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in found.stdout.split()]

    def cut(self) -> None:
        """Nothing comes or goes any more."""
        _ip("-n", self._bridge, "link", "set", self.port, "down")

    def heal(self) -> None:
        """The link is up again."""
        _ip("-n", self._bridge, "link", "set", self.port, "up")

    def stop(self) -> None:
        """End all that runs here: SIGTERM, and SIGKILL for what stays."""
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, STOP_TIMEOUT_S)):
            deadline = time.monotonic() + patience_s
            for pid in self.pids():
                _kill(pid, number)
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.1)
                if number == signal.SIGKILL:  # one of them may have started another one
                    for pid in self.pids():
                        _kill(pid, number)
        assert not self.pids(), f"still on {self.name}: {self.pids()}"


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """So many hosts, and one more that others don't know: see `network`."""
    with network(count) as (_, members):
        yield members


@contextmanager
def network(count: int) -> Iterator[tuple[Host, list[Host]]]:
    """The gateway and so many hosts; all gone at the end, and what ran there."""
    if os.getuid() or not shutil.which("ip"):
        missing("network namespaces need root and `ip` (iproute2)")
    prefix = f"fab{os.getpid()}"
    bridge = f"{prefix}-br"
    gateway = Host(bridge, GATEWAY, bridge)
    members = [Host(f"{prefix}-{one}", f"10.77.0.{10 + one}", bridge) for one in range(count)]
    made: list[Host] = []
    try:
        _make_bridge(bridge)
        made.append(gateway)
        for host in members:
            _ip("netns", "add", host.name)
            made.append(host)
            _connect(host, bridge)
        yield gateway, members
    finally:
        try:
            for host in made:
                host.stop()
        finally:
            for host in made:
                _ip("netns", "del", host.name)


def missing(reason: str) -> None:
    """Skip; in CI, where `.ci/run` installs what is needed, fail."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def need(program: str, package: str) -> str:
    """The program's path; without it the test is skipped (fails in CI)."""
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        missing(f"{program} is missing (Debian, Ubuntu: apt-get install {package})")
        raise AssertionError
    return found


def tool(name: str) -> str:
    """A command of this Python environment, such as `ray`."""
    return str(Path(sys.executable).parent / name)


def _make_bridge(bridge: str) -> None:
    _ip("netns", "add", bridge)
    _ip("-n", bridge, "link", "set", "lo", "up")
    _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
    _ip("-n", bridge, "address", "add", f"{GATEWAY}/24", "dev", "br0")
    _ip("-n", bridge, "link", "set", "br0", "up")


def _connect(host: Host, bridge: str) -> None:
    words = ("link", "add", host.port, "netns", bridge, "type", "veth", "peer", "name", "eth0")
    _ip(*words, "netns", host.name)
    _ip("-n", bridge, "link", "set", host.port, "master", "br0", "up")
    _ip("-n", host.name, "link", "set", "lo", "up")
    _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
    _ip("-n", host.name, "link", "set", "eth0", "up")
    _ip("-n", host.name, "route", "add", "default", "via", GATEWAY)


def _ip(*words: str) -> None:
    done: Any = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
