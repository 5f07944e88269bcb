"""Sees to it that nothing outlives the launcher, however that ends: also by SIGKILL.

Whatever Ray and Serve start writes its output to the private folder of this run, so it is known by
the files that it holds open (not by its environment: many of them write their title over it). The
guardian is a process of its own (10 MB, asleep) that holds one end of a pipe. When the launcher is
gone the pipe ends; who then still writes to the folder gets some seconds, and SIGKILL.

Run as a script it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

GRACE_S = 5.0
POLL_S = 0.1
KILL_ROUNDS = 50
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


def writers(folder: str, spared: Collection[int]) -> list[int]:
    """Processes that hold a file below `folder` open for writing."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdigit() and int(entry.name) not in spared:
            with suppress(OSError):  # it has ended, or is not ours to see
                if any(_writes_below(folder, entry, one.name) for one in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found


def _writes_below(folder: str, process: Path, descriptor: str) -> bool:
    try:
        target = (process / "fd" / descriptor).readlink()
        if not target.is_relative_to(folder):
            return False
        lines = (process / "fdinfo" / descriptor).read_text().splitlines()
    except OSError:  # closed meanwhile
        return False
    flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_RDONLY


def kill_writers(folder: str, grace_s: float, spared: Collection[int]) -> None:
    """Wait for the run's processes to end; kill those that don't. One of them may be starting
    another while it is being killed: so several rounds, until nobody is left."""
    deadline = time.monotonic() + grace_s
    while writers(folder, spared) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for _ in range(KILL_ROUNDS):
        left = writers(folder, spared)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left:
            return
        time.sleep(POLL_S)


def main(folder: str) -> None:
    """Sleep until stdin ends, then clean up. The launcher may be waiting for us: it is spared."""
    spared = (os.getpid(), os.getppid())
    sys.stdin.buffer.read()
    kill_writers(folder, GRACE_S, spared)


if __name__ == "__main__":
    main(sys.argv[1])
