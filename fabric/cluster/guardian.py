"""Sees to it that nothing outlives the launcher, however that ends: also by SIGKILL.

Everything that the launcher starts inherits the variable `MARK` from it, whose value is the folder
of this run. The guardian is a process of its own (10 MB, asleep) that holds one end of a pipe. When
the launcher is gone the pipe ends; what then still carries the mark gets some seconds, and SIGKILL.

Run as a script it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "FABRIC_RUN"
GRACE_S = 5.0
PROC = Path("/proc")


class Guardian:
    """The launcher's end. `folder`: of this run."""

    def __init__(self, folder: Path) -> None:
        # A session of its own: Ctrl-C in the terminal is not meant for it.
        self._process = subprocess.Popen(
            [sys.executable, "-SEI", __file__, str(folder)],
            stdin=subprocess.PIPE,
            env={},
            start_new_session=True,
        )

    def release(self) -> None:
        """The launcher has cleaned up: waits until what is left, if anything, has been killed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def marked(folder: str) -> list[int]:
    """Processes of the run with this folder, but for the caller."""
    mark = f"{MARK}={folder}".encode()
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):  # it has ended, or is not ours to see
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def kill_marked(folder: str, grace_s: float) -> None:
    """Wait for the run's processes to end; kill those that don't."""
    deadline = time.monotonic() + grace_s
    while (left := marked(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def main(folder: str) -> None:
    """Sleep until stdin ends, then clean up."""
    sys.stdin.buffer.read()
    kill_marked(folder, GRACE_S)


if __name__ == "__main__":
    main(sys.argv[1])
