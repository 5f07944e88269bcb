"""An end that comes too early, or that nobody can prepare for: nothing is left running.

Every other server of these tests ends with Ctrl-C while it serves (`kit.fabric_server.serving`).
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

from kit.fabric_server import START_TIMEOUT_S, FabricServer, eventually
from kit.tiny_models import make_tiny_model


def test_ctrl_c_while_starting_leaves_nothing_running(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    server = FabricServer([str(model)], tmp_path)
    try:
        eventually(lambda: len(server.processes()) > 3, within_s=60)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130)
        assert not server.left_over(), server.output
        assert "Traceback" not in server.output
    finally:
        server.stop()


def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    """SIGKILL, as the memory killer sends it: nobody can clean up, and all the same all end. Before
    that, clients that come too early."""
    model = make_tiny_model(tmp_path / "model")
    server = FabricServer([str(model)], tmp_path)
    try:
        assert statuses_until_ready(server) <= {200, 503}
        server.wait_until_ready()
        server.signal(signal.SIGKILL)
        server.wait()
        eventually(lambda: not server.left_over(), within_s=60)
    finally:
        server.stop()


def statuses_until_ready(server: FabricServer) -> set[int]:
    """What a client that comes too early gets: a JSON error with a time to wait."""
    found: set[int] = set()
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Serving " not in server.output and time.monotonic() < deadline:
        with suppress(OSError):  # nobody listens yet
            answer = server.get("/v1/models")
            found.add(answer.status)
            if answer.status == 503:
                assert answer.json()["error"]["type"]
                assert int(answer.headers["retry-after"]) >= 1
        time.sleep(0.05)
    return found
