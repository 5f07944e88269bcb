"""Ctrl-C, at any time: exit, and nothing is left running."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest
from kit.fabric_server import START_TIMEOUT_S, FabricServer, eventually
from kit.tiny_models import make_tiny_model


@pytest.mark.parametrize("moment", ["starting", "serving"])
def test_ctrl_c_leaves_nothing_running(moment: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    server = FabricServer([str(model)], tmp_path)
    try:
        if moment == "serving":
            statuses = statuses_until_ready(server)
            assert statuses <= {200, 503}
            server.wait_until_ready()
        else:
            eventually(lambda: len(server.processes()) > 3, within_s=60)
        server.signal(signal.SIGINT)
        assert server.wait() in (0, 130)
        assert not server.left_over(), server.output
        assert "Traceback" not in server.output
    finally:
        server.stop()


def test_a_killed_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    """SIGKILL, as the memory killer sends it: nobody can clean up, and all the same all end."""
    model = make_tiny_model(tmp_path / "model")
    server = FabricServer([str(model)], tmp_path)
    try:
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
