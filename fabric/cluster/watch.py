"""One request as its dispatcher sees it: when it came, went, spoke and ended.

arrival ──> sent ──> begun ──> first token ── per token ──> last token
   ├─── queue wait ────┘            │                            │
   ├────── time to first token ─────┘                            │
   └─────────────────── end to end ──────────────────────────────┘

`begun`, its first step, is told by the replica with its first token.
"""

from __future__ import annotations

from fabric.core.attainment import Outcome
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.traffic.fetching import Fetch
from fabric.core.traffic.journey import Journey
from fabric.core.traffic.router import Choice
from fabric.gateway.backend import Service

NS = 1_000_000_000


class Watch:
    """Times on the clock of `time.time_ns()`; `note` is called once an item."""

    __slots__ = (
        "begun",
        "degraded",
        "fetch",
        "first",
        "journey",
        "last",
        "over",
        "prefill_id",
        "sent",
        "tokens",
    )

    def __init__(self, request: Request, degraded: str = "") -> None:
        self.journey = Journey(request)
        self.degraded = degraded
        self.prefill_id: str | None = None  # who computes its prompt for another replica
        self.fetch: Fetch | None = None  # from where its prefix comes
        self.sent: int | None = None
        self.begun: int | None = None
        self.first: int | None = None
        self.last = 0
        self.tokens = 0
        # Choices that came to their end; a stop string in the text is one, too. A set: the last
        # token may have come before the text was looked at.
        self.over: set[int] = set()

    @property
    def request(self) -> Request:
        """As it was taken out of the queue first."""
        return self.journey.request

    def goes(self, request: Request, choice: Choice, now: int) -> None:
        """It was taken out of the queue, as `request`. What it is was settled the first time."""
        self.prefill_id, self.fetch = choice.prefill_id, choice.fetch
        if self.sent is None:
            self.sent = now
            self.journey = Journey(request)

    @property
    def finished(self) -> bool:
        """Every choice came to its end."""
        return len(self.over) >= self.request.sampling.n

    def note(self, chunks: tuple[TokenChunk, ...], now: int) -> None:
        """Tokens have come."""
        for chunk in chunks:
            if self.begun is None:
                self.begun = chunk.begun
            self.tokens += len(chunk.tokens)
            if chunk.finish is Finish.STOP or chunk.finish is Finish.LENGTH:
                self.over.add(chunk.choice)
        if self.first is None:
            self.first = now
        self.last = now

    def tpot_s(self) -> float | None:
        """Seconds per token after the first, over all choices; None for fewer than two tokens."""
        each = self.tokens / self.request.sampling.n
        if self.first is None or each < 2:
            return None
        return (self.last - self.first) / NS / (each - 1)

    def queue_wait_s(self) -> float | None:
        """Seconds until its first step; until it was sent, where nothing is known of a step."""
        over = self.sent if self.begun is None else self.begun
        return None if over is None else max(0, over - self.request.arrival) / NS

    def service(self, replica_id: str) -> Service:
        """What its answer says of how it is served there."""
        waited_s = self.queue_wait_s()
        return Service(
            replica=replica_id,
            queue_ms=None if waited_s is None else 1000 * waited_s,
            degraded=self.degraded,
        )

    def outcome(self) -> Outcome:
        """Of a request that was sent and is over, not by its client's leaving."""
        request, arrival = self.request, self.request.arrival
        done = self.finished and self.first is not None
        return Outcome(
            tier=request.tier,
            tenant=request.tenant,
            version=request.model_version,
            adapter=request.adapter,
            queue_wait_s=self.queue_wait_s(),
            ttft_s=None if self.first is None else max(0, self.first - arrival) / NS,
            tpot_s=self.tpot_s(),
            e2e_s=max(0, self.last - arrival) / NS if done else None,
            tokens=self.tokens,
            deadline_kept=request.deadline is None or (done and self.last <= request.deadline),
        )


def refused(request: Request) -> Outcome:
    """Of a request that was turned away for want of capacity."""
    return Outcome(
        tier=request.tier,
        tenant=request.tenant,
        version=request.model_version,
        adapter=request.adapter,
        refused=True,
    )
