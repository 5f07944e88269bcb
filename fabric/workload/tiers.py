"""Two workloads that compete: short interactive requests, and batch requests that fill an engine.

Together they are three times what an engine can do: interactive `INTERACTIVE_SHARE` of what it can
do of interactive ones alone, batch `BATCH_SHARE` of what it can do of batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.workload import Lengths, TierShare, Workload

INTERACTIVE = Workload(
    name="interactive",
    prompt=Lengths(median=96, sigma=0.5, low=32, high=384),
    output=Lengths(median=32, sigma=0.5, low=4, high=128),
    tiers=(TierShare(tier="interactive", weight=1.0),),
)
BATCH = Workload(
    name="batch",
    prompt=Lengths(median=192, sigma=0.7, low=32, high=1024),
    output=Lengths(median=96, sigma=0.7, low=8, high=384),
    tiers=(TierShare(tier="batch", weight=1.0),),
)
INTERACTIVE_SHARE = 0.3
BATCH_SHARE = 2.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """How it went. TTFT p99 of interactive requests, ms: alone, and beside batch; the 99th
    percentile of a step when they were alone, ms; tokens whose KV preempted sequences had, and how
    many of those were computed again; output tokens a second by tiers, and of the same trace in one
    tier, first come first served."""

    alone_ms: float
    beside_ms: float
    step_ms: float
    preempted: int
    dropped: int
    tokens_per_s: float
    fifo_tokens_per_s: float

    def verdicts(self) -> tuple[tuple[str, str, bool], ...]:
        """What is promised: in words, the figure found, and whether it is good enough."""
        bound_ms = 1.2 * self.alone_ms + self.step_ms
        kept = 1 - self.dropped / max(self.preempted, 1)
        share = self.tokens_per_s / self.fifo_tokens_per_s
        return (
            (
                "interactive TTFT p99 is at most 1.2 times that of an unloaded engine and a step",
                f"{self.beside_ms:.0f} ms, the bound is {bound_ms:.0f} ms",
                self.beside_ms <= bound_ms,
            ),
            (
                "nine tenths of preempted work and more are not computed again",
                f"{kept:.1%} of {self.preempted} tokens",
                self.preempted > 0 and kept >= 0.9,
            ),
            (
                "throughput is at least nine tenths of that of one tier, first come first served",
                f"{share:.1%}",
                share >= 0.9,
            ),
        )
