"""Latencies of one replica, from arrival at the front to the commit of a token.

Times of a request, all on the clock of `time.time_ns()`:

    arrival ──── queue time ──> in the engine ───> first token ── inter-token ──> ... ──> last token
       └───────────── time to first token ───────────┘                                      │
       └──────────────────────────────── end to end ─────────────────────────────────────────┘
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fabric.cluster.reports import HistogramReport
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

NS = 1_000_000_000
RATE_WINDOW_S = 10.0

# Upper bounds in seconds, those that vLLM's dashboards expect.
BOUNDS: Mapping[str, Sequence[float]] = {
    "time_to_first_token_seconds": (
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
        10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
    ),
    "inter_token_latency_seconds": (
        0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
        5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    ),
    "e2e_request_latency_seconds": (
        0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
        240.0, 480.0, 960.0, 1920.0, 7680.0,
    ),
    "request_queue_time_seconds": (
        0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0,
        30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    ),
}  # fmt: skip


class Histogram:
    """Counts per bucket. Two of the same bounds can be added."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bounds = BOUNDS[name]
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def report(self) -> HistogramReport:
        """A frozen copy."""
        return HistogramReport(name=self.name, counts=tuple(self.counts), total=self.total)


@dataclass(slots=True)
class _Life:
    arrival: int
    choices: int
    resumed: bool  # its first token came from another replica
    last: dict[int, int] = field(default_factory=dict)  # choice -> when its newest token came
    ended: set[int] = field(default_factory=set)


class Measures:
    """Watches requests go by. Forgets a request when it finishes or is aborted."""

    def __init__(self) -> None:
        self.histograms = {name: Histogram(name) for name in BOUNDS}
        self.finished: dict[str, int] = {}
        self._lives: dict[str, _Life] = {}
        self._rates: deque[tuple[int, int, int]] = deque()

    def began(self, request: Request, now: int) -> None:
        """The request is handed to the engine."""
        self._lives[request.request_id] = _Life(
            request.arrival, request.choices_left, request.resumed
        )
        if not request.resumed:
            queued_s = max(0, now - request.arrival) / NS
            self.histograms["request_queue_time_seconds"].observe(queued_s)

    def produced(self, chunks: list[TokenChunk], now: int) -> None:
        """One step's tokens."""
        first = self.histograms["time_to_first_token_seconds"]
        later = self.histograms["inter_token_latency_seconds"]
        for chunk in chunks:
            life = self._lives.get(chunk.request_id)
            if life is None:
                continue
            if chunk.tokens:
                last = life.last.get(chunk.choice)
                if last is not None:
                    later.observe((now - last) / NS)
                elif not life.last and not life.resumed:
                    first.observe(max(0, now - life.arrival) / NS)
                life.last[chunk.choice] = now
            if chunk.finish is not None:
                self.ended(chunk.request_id, chunk.choice, chunk.finish, now)

    def ended(self, request_id: str, choice: int, reason: Finish, now: int) -> None:
        """A choice has ended; the first reason given counts (a stop string's comes before the
        abort that it causes)."""
        life = self._lives.get(request_id)
        if life is None or choice in life.ended:
            return
        life.ended.add(choice)
        self.finished[reason.value] = self.finished.get(reason.value, 0) + 1
        if len(life.ended) == life.choices:
            del self._lives[request_id]
            self.histograms["e2e_request_latency_seconds"].observe(max(0, now - life.arrival) / NS)

    def forget(self, request_id: str) -> None:
        """The request was aborted."""
        self._lives.pop(request_id, None)

    def begin_anew(self) -> None:
        """The engine's counters begin at zero again."""
        self._rates.clear()

    def sample(self, snapshot: ReplicaSnapshot, now: int) -> None:
        """Remember the counters for `rates`; call about once a second."""
        self._rates.append((now, snapshot.prompt_tokens_total, snapshot.generated_tokens_total))
        while now - self._rates[0][0] > RATE_WINDOW_S * NS:
            self._rates.popleft()

    def rates(self) -> tuple[float, float]:
        """Prompt and generated tokens per second over the last ten seconds."""
        if len(self._rates) < 2:
            return 0.0, 0.0
        (begin, prompt, generated), (end, prompt_now, generated_now) = (
            self._rates[0],
            self._rates[-1],
        )
        seconds = (end - begin) / NS
        return (prompt_now - prompt) / seconds, (generated_now - generated) / seconds
