"""What a run leaves behind: a timeline a request, a series a replica. Kept outside of the core."""

from __future__ import annotations

from dataclasses import dataclass, field

from fabric.core.request import Finish, Request
from fabric.core.snapshot import ReplicaSnapshot


@dataclass(slots=True, kw_only=True)
class Timeline:
    """One request's life; times in ns, None: it never came to that.

    `arrived`: at the dispatcher. `routed`: it left the queue for `replica`. `begun`: its first
    step there. `first`, `last`: its tokens at the client. `refusal`: why it was turned away.
    `tokens`: all choices together. `losses`: replicas that died under it, or were not reached.
    `prompt_tokens` stays where a lean run has dropped the prompt itself.
    """

    request: Request
    prompt_tokens: int = 0
    dispatcher: str = ""
    arrived: int | None = None
    routed: int | None = None
    replica: str | None = None
    begun: int | None = None
    first: int | None = None
    last: int | None = None
    tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    losses: int = 0
    finish: Finish | None = None
    refusal: str | None = None
    retry_after_s: float | None = None

    @property
    def ended(self) -> bool:
        """Answered to the end, or turned away."""
        return self.finish is not None or self.refusal is not None

    @property
    def ttft_ns(self) -> int | None:
        """Time to the first token, from the arrival that the client meant."""
        return None if self.first is None else self.first - self.request.arrival

    @property
    def tpot_ns(self) -> float | None:
        """Time per output token after the first; None for fewer than two."""
        if self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def e2e_ns(self) -> int | None:
        """From arrival to the last token of a request that was answered to the end."""
        if self.finish is None or self.last is None:
            return None
        return self.last - self.request.arrival

    @property
    def waited_ns(self) -> int | None:
        """Until its first step: in the dispatcher's queue, on the way, in the engine's queue."""
        if self.arrived is None or self.begun is None:
            return None
        return self.begun - self.arrived

    @property
    def queued_ns(self) -> int | None:
        """In the dispatcher's queue."""
        if self.arrived is None or self.routed is None:
            return None
        return self.routed - self.arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The fleet at one moment, once a second. `ready` replicas take requests; GPUs are paid for
    all of `ready`, `starting` and `draining`."""

    at: int
    ready: int
    starting: int
    draining: int
    queued_requests: int
    queued_tokens: int
    snapshots: tuple[ReplicaSnapshot, ...]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """Everything that a run tells. `ended`: virtual ns; `events`: how many happened. `handovers`:
    of prompts from pool to pool, by what happened, with the bytes that travelled."""

    timelines: list[Timeline] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    replica_ns: int = 0  # summed over replicas, from the order to start to the removal
    ended: int = 0
    events: int = 0
    handovers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Something that a controller did, and why, in words."""

    at: int
    subject: str
    value: int
    why: str
