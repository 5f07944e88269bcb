"""How often an engine was made anew in its place, and whether it may be once more."""

from __future__ import annotations

from collections import deque

# Beyond, Serve replaces the whole replica: something is wrong with the process or the machine.
REBUILDS_MAX = 3
WITHIN_S = 600.0


class Rebuilds:
    """Times are on the monotonic clock, in seconds."""

    def __init__(self) -> None:
        self.total = 0
        self.hung = 0  # because a step was overdue
        self.under_way = False
        self._last: deque[float] = deque(maxlen=REBUILDS_MAX)
        self._stopped = False

    def allowed(self, now_s: float) -> bool:
        """Once more? Not while one is under way."""
        if self.under_way or self._stopped:
            return False
        return len(self._last) < REBUILDS_MAX or now_s - self._last[0] > WITHIN_S

    def begin(self, now_s: float, *, hung: bool) -> None:
        """One begins."""
        self.total += 1
        self.hung += hung
        self.under_way = True
        self._last.append(now_s)

    def stop(self) -> None:
        """It failed: no more of them."""
        self._stopped = True
