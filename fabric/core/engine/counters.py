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
