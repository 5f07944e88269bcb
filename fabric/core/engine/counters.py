"""What an engine counts over its life. Each number only grows; `ReplicaSnapshot` shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, kw_only=True)
class Counters:
    """Names as in `ReplicaSnapshot`, without `_total`."""

    prefix_queries: int = 0
    prefix_hits: int = 0
    preemptions: int = 0
    swaps: int = 0
    preempted_tokens: int = 0
    dropped_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    steps: int = 0
    busy_ns: int = 0
    _busy_since: int | None = None

    def step_began(self, now: int) -> None:
        """A plan was made; perhaps others are under way."""
        if self._busy_since is None:
            self._busy_since = now

    def step_ended(self, now: int, *, more: bool) -> None:
        """A plan was committed; `more` are under way. A clock set back counts as standing still."""
        assert self._busy_since is not None, "a step that never began"
        self.steps += 1
        self.busy_ns += max(0, now - self._busy_since)
        self._busy_since = now if more else None
