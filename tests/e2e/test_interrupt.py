"""Ctrl-C that comes too early: nothing is left running.

Servers of other tests end with Ctrl-C while they serve (`kit.fabric_server.serving`), or are killed
(`test_killed_server.py`).
"""

from __future__ import annotations

import signal
from pathlib import Path

from kit.fabric_server import FabricServer, eventually
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
