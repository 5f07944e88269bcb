"""How even the work of replicas is, and what a router promises of it: in the simulator and live.

A replica's latency is that of a token: the time of all its requests, arrival to last token, over
their output tokens (as Orca and vLLM report it). Its mean latency a request varies by chance alone:
which outputs it was given to write. It is there for comparison.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

LEAST_HITS = 0.95
MOST_OF_ROUND_ROBIN = 1 / 3
MOST_SPREAD = 1.3
ROUND_ROBIN_SPREAD = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request that was answered to its end. `waited_ms`: until its first step."""

    replica: str
    waited_ms: float
    ttft_ms: float
    e2e_ms: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """Over replicas: coefficients of variation of the 99th percentile of the wait and of the mean
    number of open requests; the slowest replica's latency over the fastest one's, a token and a
    request. Over requests: the share of prompt tokens found in a cache, TTFT p99 in ms."""

    wait: float
    depth: float
    latency: float
    mean_latency: float
    hits: float
    ttft_ms: float


def evenness(served: Sequence[Served], depths: Mapping[str, Sequence[float]]) -> Evenness:
    """`depths`: by replica, how many requests were open there, again and again."""
    mine: dict[str, list[Served]] = {}
    for one in served:
        mine.setdefault(one.replica, []).append(one)
    waits = [percentile([one.waited_ms for one in group], 0.99) for group in mine.values()]
    means = [statistics.fmean(one.e2e_ms for one in group) for group in mine.values()]
    latencies = [
        sum(one.e2e_ms for one in group) / sum(one.tokens for one in group)
        for group in mine.values()
    ]
    return Evenness(
        wait=_variation(waits),
        depth=_variation([statistics.fmean(seen) for seen in depths.values()]),
        latency=max(latencies) / min(latencies),
        mean_latency=max(means) / min(means),
        hits=sum(one.cached_tokens for one in served) / sum(one.prompt_tokens for one in served),
        ttft_ms=percentile([one.ttft_ms for one in served], 0.99),
    )


def mean_of(found: Sequence[Evenness]) -> Evenness:
    """Of several seeds. A coefficient of variation over three replicas is mostly chance, its mean
    over seeds is less so."""
    means = {
        each.name: statistics.fmean(getattr(one, each.name) for one in found)
        for each in fields(Evenness)
    }
    return Evenness(**means)


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest, as numpy's."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def verdicts(
    ours: Evenness, round_robin: Evenness, affinity: Evenness
) -> tuple[tuple[str, str, bool], ...]:
    """What is promised: in words, the figure found, and whether it is good enough."""
    wait, depth = ours.wait / round_robin.wait, ours.depth / round_robin.depth
    hits = ours.hits / affinity.hits
    return (
        (
            "the 99th percentile of the wait varies at most a third as much as by round robin",
            f"{wait:.2f}",
            wait <= MOST_OF_ROUND_ROBIN,
        ),
        (
            "the mean number of open requests varies at most a third as much",
            f"{depth:.2f}",
            depth <= MOST_OF_ROUND_ROBIN,
        ),
        (
            "the slowest replica's latency is less than 1.3 times the fastest's (round robin's: 3)",
            f"{ours.latency:.2f} against {round_robin.latency:.2f}",
            ours.latency < MOST_SPREAD and round_robin.latency >= ROUND_ROBIN_SPREAD,
        ),
        (
            "prefix hits are within a twentieth of pure affinity's",
            f"{hits:.1%}",
            hits >= LEAST_HITS,
        ),
    )


def _variation(values: Sequence[float]) -> float:
    return statistics.pstdev(values) / statistics.fmean(values)
