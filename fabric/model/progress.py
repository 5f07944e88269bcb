"""Showing how far a long download or conversion is."""

from __future__ import annotations

import sys
from collections.abc import Callable

# (what is done, bytes so far, bytes in all); called often, cheap to ignore.
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Shows nothing."""


class ProgressBar:
    """A bar on stderr: redrawn in a terminal, a line every tenth elsewhere (short logs)."""

    WIDTH = 30

    def __init__(self) -> None:
        self._shown: tuple[str, int] | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        """Draw, if it differs from what is shown."""
        percent = 100 * min(done, total) // max(total, 1)
        step = 1 if sys.stderr.isatty() else 10
        state = (what, percent // step)
        if state == self._shown:
            return
        self._shown = state
        filled = self.WIDTH * percent // 100
        bar = "█" * filled + "·" * (self.WIDTH - filled)
        line = f"{what} {bar} {percent:3d} %  {done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{line}" + ("\n" if percent == 100 else ""))
        else:
            sys.stderr.write(line + "\n")
        sys.stderr.flush()
