"""Real processes: started, found ready, and gone afterwards with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kit import sse_server
from kit.sse_server import MODEL

from fabric.bench.server import Launch, Server, ServerError, free_port, process_tree

STUBBORN_CHILD = """
import subprocess, sys, time
code = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(99)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
child.stdout.readline()
print("CHILD", child.pid, flush=True)
time.sleep(99)
"""
ORPHAN = """
import subprocess, sys, time
daemon = "import time; time.sleep(99)"
middle = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]])"
subprocess.run([sys.executable, "-c", middle, daemon])
print(flush=True)
time.sleep(99)
"""


def start(folder: Path, command: tuple[str, ...], port: int = 1, within_s: float = 20) -> Server:
    launch = Launch(
        name="kit",
        command=command,
        port=port,
        variables={"KIT_WORD": "hello"},
        log=folder / "logs" / "kit.log",
        ready_within_s=within_s,
    )
    return Server(launch)


def kit_server(port: int) -> tuple[str, ...]:
    return (sys.executable, sse_server.__file__, str(port))


def test_a_server_answers_while_entered_and_is_gone_afterwards(tmp_path: Path) -> None:
    port = free_port()
    with start(tmp_path, kit_server(port), port) as server:
        assert server.model == MODEL
        assert server.ready_after_s > 0
        pid = server._process.pid if server._process else 0
        assert len(process_tree(pid)) == 1
        assert b"KIT_WORD=hello" in Path(f"/proc/{pid}/environ").read_bytes()
        assert os.getsid(pid) == pid  # Ctrl-C in our terminal does not reach it
    assert not process_tree(pid)


def test_what_a_server_leaves_behind_is_killed(tmp_path: Path) -> None:
    # It never serves, so the entry fails: and must clean up, too.
    server = start(tmp_path, (sys.executable, "-c", STUBBORN_CHILD), within_s=1.5)
    with pytest.raises(ServerError, match="no token within") as failed, server:
        pass
    child = int(str(failed.value).split("CHILD ")[1].split()[0])
    assert gone(child)


def test_a_daemon_that_lost_its_parent_belongs_to_the_tree() -> None:
    leader = subprocess.Popen(
        [sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert leader.stdout is not None
        leader.stdout.readline()
        assert len(process_tree(leader.pid)) == 2
    finally:
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait(10)
        leader.stdout.close()


def test_a_server_that_dies_shows_the_end_of_its_log(tmp_path: Path) -> None:
    script = "import sys; print('no such weights'); sys.exit(3)"
    with (
        pytest.raises(ServerError, match="no such weights"),
        start(tmp_path, (sys.executable, "-c", script)),
    ):
        pass


def test_sigterm_leaves_no_server(tmp_path: Path) -> None:
    port, before = free_port(), signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(SystemExit) as ended,
        start(tmp_path, kit_server(port), port) as server,
    ):
        pid = server._process.pid if server._process else 0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # not reached: the signal is taken between two instructions
    assert ended.value.code == 128 + signal.SIGTERM
    assert pid
    assert not process_tree(pid)
    assert signal.getsignal(signal.SIGTERM) == before


def gone(pid: int) -> bool:
    """Does the process end within a second (it may still be a zombie of init's)?"""
    for _ in range(50):
        if not process_tree(pid):
            return True
        time.sleep(0.02)
    return False
