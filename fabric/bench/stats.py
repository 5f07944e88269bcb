"""From when tokens came to what people ask: TTFT, TPOT, ITL, E2E, tok/s, goodput.

The field's definitions (DistServe, OSDI '24; vLLM's and NVIDIA's benchmarks use the same):

    TTFT   first token − due           E2E   last token − due
    TPOT   (last token − first token) / (output tokens − 1); requests of one token have none
    ITL    gap between two content events of one stream (tokens that travel together make one gap)
    goodput   requests per second that met every target they were given; a failed one met none

"Due" is when a request should have left. In an open loop that is its arrival time, so that a client
which falls behind can't hide the server's queue (coordinated omission); in a closed loop it is the
moment of sending.
Percentiles are exact: all samples are kept, with linear interpolation between the two nearest
(numpy's default).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

NS_PER_MS = 1e6
NS_PER_S = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request as the client saw it, in monotonic ns; `times` has one entry a content event.
    `replica`, `queue_ms`: where it ran and how long it waited there and before, if told."""

    tier: str
    wanted_tokens: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    due: int
    sent: int
    times: tuple[int, ...]
    error: str | None = None
    replica: str | None = None
    queue_ms: float | None = None

    @property
    def ttft_ms(self) -> float:
        """Due to first token."""
        return (self.times[0] - self.due) / NS_PER_MS

    @property
    def e2e_ms(self) -> float:
        """Due to last token."""
        return (self.times[-1] - self.due) / NS_PER_MS

    @property
    def tpot_ms(self) -> float | None:
        """Per output token after the first; None when there is only one."""
        if self.output_tokens < 2:
            return None
        return (self.times[-1] - self.times[0]) / NS_PER_MS / (self.output_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a good answer is. What is not asked for is None."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def met_by(self, sample: Sample) -> bool:
        """Did the request meet every target?"""
        if sample.error is not None:
            return False
        pairs = (
            (sample.ttft_ms, self.ttft_ms),
            (sample.tpot_ms, self.tpot_ms),
            (sample.e2e_ms, self.e2e_ms),
        )
        return all(got is None or limit is None or got <= limit for got, limit in pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How a quantity is distributed over requests (ITL: over gaps), in ms."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None when there are no values."""
        if not values:
            return None
        data = np.asarray(values, dtype=np.float64)
        p50, p90, p99 = (float(value) for value in np.percentile(data, (50, 90, 99)))
        return cls(mean=float(data.mean()), p50=p50, p90=p90, p99=p99, max=float(data.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """One cell: a workload at a rate or a concurrency.

    `duration_s` runs from the first request due to the last token of all. `goodput_rps` is None
    when no target was given. `off_length`: requests whose output had not the length asked for (the
    server did not take `ignore_eos`): compare such cells with care. `errors`: messages, how often.
    """

    requests: int
    completed: int
    duration_s: float
    output_tokens: int
    prompt_tokens: int
    cached_tokens: int
    output_tok_s: float
    total_tok_s: float
    requests_s: float
    goodput_rps: float | None
    good_share: float | None
    off_length: int
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    errors: tuple[tuple[str, int], ...]


def summarize(samples: Sequence[Sample], targets: Targets | None = None) -> Summary:
    """All figures of a cell. Tokens of failed requests don't count. `ValueError` if empty."""
    if not samples:
        raise ValueError("no request was sent: nothing to summarize")
    good = [sample for sample in samples if sample.error is None]
    start = min(sample.due for sample in samples)
    end = max((sample.times[-1] for sample in good), default=start)
    duration_s = (end - start) / NS_PER_S
    output = sum(sample.output_tokens for sample in good)
    prompt = sum(sample.prompt_tokens for sample in good)
    met = sum(targets.met_by(sample) for sample in good) if targets else None
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    return Summary(
        requests=len(samples),
        completed=len(good),
        duration_s=duration_s,
        output_tokens=output,
        prompt_tokens=prompt,
        cached_tokens=sum(sample.cached_tokens for sample in good),
        output_tok_s=_rate(output, duration_s),
        total_tok_s=_rate(output + prompt, duration_s),
        requests_s=_rate(len(good), duration_s),
        goodput_rps=None if met is None else _rate(met, duration_s),
        good_share=None if met is None else met / len(samples),
        off_length=sum(sample.output_tokens != sample.wanted_tokens for sample in good),
        ttft_ms=Spread.of([sample.ttft_ms for sample in good]),
        tpot_ms=Spread.of([tpot for s in good if (tpot := s.tpot_ms) is not None]),
        itl_ms=Spread.of([gap for sample in good for gap in _gaps_ms(sample)]),
        e2e_ms=Spread.of([sample.e2e_ms for sample in good]),
        errors=tuple(errors.most_common()),
    )


def _gaps_ms(sample: Sample) -> list[float]:
    times = sample.times
    return [(b - a) / NS_PER_MS for a, b in pairwise(times)]


def _rate(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
