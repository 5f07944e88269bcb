"""`fabric serve`: start Ray and the application, say what happens, wait, stop everything again.

port free? ──> Ray ──> Serve ──> replicas load ──> first token over HTTP ──> URL
                                                                              │ Ctrl-C, SIGTERM
exit 0 <── all processes gone <── Serve and Ray down <── running requests <── 503 for new ones
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from fabric import __version__
from fabric.cluster.app import import_ray, prepare_environment
from fabric.cluster.run import Run
from fabric.cluster.server import Server
from fabric.config import FabricConfig
from fabric.core.errors import ConfigError, FabricError
from fabric.gateway.backend import ServedModel

LOAD_TIMEOUT_S = 1800.0
POLL_S = 0.25  # each time costs Ray and Serve some of the CPU that loads the model
WATCH_S = 1.0
RUNS_KEPT = 5
# Unix sockets have names of at most 107 bytes, and Ray and HAProxy put long ones below this folder.
FOLDER_CHARS_MAX = 24


class ServerFailed(FabricError):
    """The server could not start, or stopped by itself."""


def serve(config: FabricConfig, find_model: Callable[[], ServedModel], *, cache: Path) -> int:
    """Run until SIGINT or SIGTERM; 0 after a drain. `cache`: the folder where logs are kept.

    Raises `ConfigError`, or what `find_model` raises, before anything is started.
    """
    began = time.monotonic()
    check_port(config.server.host, config.server.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until there is more to tidy up
    folder = _private_folder()
    try:
        prepare_environment(config, folder)
        import_ray()  # takes a second, in which the model is being checked
        model = find_model()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    stop = threading.Event()
    _on_signals(stop)
    logs = _log_folder(cache / "logs")
    run = Run(folder=folder, logs=logs, cache=cache, launcher_pid=os.getpid())
    server = Server(config, model, run)
    first, most = config.first_replicas, config.most_replicas
    replicas = f"{first} engine replica{'s' * (first > 1)}"
    if config.scaled_pools:
        least = config.autoscaling.min_replicas if config.autoscaling else first
        replicas += f" at first, {least} to {most} by load"
    _say(f"fabric {__version__}: {model.name}, {replicas}")
    failed = True
    try:
        _start(server)
        _on_signals(stop)  # Ray has put its own handlers there
        _wait_until_loaded(server, stop)
        if not stop.is_set():
            _say(f"  first token after {time.monotonic() - began:.1f} s\n{welcome(server)}")
            _watch(server, stop)
            _drain(server, stop)
        failed = False
    finally:
        server.stop(keep_logs=failed)
    return 0


def check_port(host: str, port: int) -> None:
    """Raises `ConfigError` when the address can't be bound."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {host}:{port}: {error.strerror or error}; is another server running "
            "there? Choose another port with --port"
        ) from None


def _start(server: Server) -> None:
    try:
        server.start()
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ServerFailed(
            f"Ray did not start ({type(error).__name__}: {reason}); logs: {server.run.logs}"
        ) from error


def _on_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _private_folder() -> Path:
    base = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="fabric-", dir=base if len(base) < 8 else "/tmp")
    assert len(folder) <= FOLDER_CHARS_MAX, f"{folder} is too long a name"
    return Path(folder)


def _log_folder(root: Path) -> Path:
    """A folder for this run; the newest runs are kept."""
    folder = root / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
    folder.mkdir(parents=True, mode=0o700)
    for old in sorted(root.iterdir())[:-RUNS_KEPT]:
        if not Path("/proc", old.name.rpartition("-")[2]).exists():  # its server is gone
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _wait_until_loaded(server: Server, stop: threading.Event) -> None:
    """Show the replicas' progress until a token has come over HTTP. Raises `ServerFailed`."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while not stop.is_set():
        _show_progress(server)
        if first_token(server):
            server.loaded = True
            return
        if problem := server.problem():
            raise ServerFailed(f"{problem}; logs: {server.run.logs}")
        if time.monotonic() > deadline:
            raise ServerFailed(f"not ready after {LOAD_TIMEOUT_S:.0f} s; logs: {server.run.logs}")
        stop.wait(POLL_S)


def _show_progress(server: Server) -> None:
    """What the replicas say. Raises `ServerFailed` where one of them can't go on."""
    show_replica = server.config.most_replicas > 1
    for line in server.progress():
        if line.fatal:
            raise ServerFailed(line.text)
        _say(f"  {line.replica + ': ' if show_replica else ''}{line.text}")


def first_token(server: Server) -> bool:
    """Generate one token through the front door, if all replicas are ready."""
    if not server.replicas_are_running():
        return False
    body = {"model": server.model.name, "prompt": [0], "max_tokens": 1}
    headers = {"content-type": "application/json"}
    if keys := server.config.api_keys():
        headers["authorization"] = f"Bearer {keys[0]}"
    try:
        connection = HTTPConnection(
            server.config.server.host, server.config.server.port, timeout=60
        )
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, HTTPException):
        return False
    if answer.status == 200:
        return True
    if answer.status in (429, 503):
        return False
    raise ServerFailed(f"the first request got {answer.status}: {text[:500].decode()}")


def _watch(server: Server, stop: threading.Event) -> None:
    """Wait for a signal; a replica that is replaced is heard of. Raises `ServerFailed` when Ray
    goes down under us."""
    while not stop.wait(WATCH_S):
        if dead := server.dead_processes():
            raise ServerFailed(f"Ray stopped unexpectedly ({dead}); logs: {server.run.logs}")
        _show_progress(server)


def _drain(server: Server, hurry: threading.Event) -> None:
    _say("Stopping: new requests get a 503, running ones may finish (Ctrl-C again: at once).")
    hurry.clear()
    left = server.drain(hurry.is_set)
    _say(f"Stopped with {left} requests still running." if left else "All requests are done.")


def welcome(server: Server) -> str:
    """Where it serves and logs, and a line to paste into a shell."""
    host, port = server.config.server.host, server.config.server.port
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = " -H 'authorization: Bearer YOUR_KEY'" if server.config.api_keys() else ""
    body = {
        "model": server.model.name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    return (
        f"\nServing {server.model.name} on {url} (Ctrl-C stops)\n"
        f"Logs: {server.run.logs}\n\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} \\\n"
        f"    -d {shlex.quote(json.dumps(body))}\n"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
