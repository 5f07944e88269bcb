"""How long will the output be? Online quantiles, calibrated, from coarse to fine.

    (tenant, version, adapter, prompt bucket, max_tokens)      the finest that has seen enough
        (version, adapter, prompt bucket, max_tokens)          answers; where data is thin,
            (version, adapter)  ->  ()                         the next one up

A node keeps a histogram with a fading memory, in buckets that are exact up to 16 tokens and 10 %
wide beyond. The level that it reads off is corrected by how often its last answers were right:
adaptive conformal inference (Gibbs and Candes, NeurIPS 2021), whose long-run coverage is the
target whatever the lengths do, since every miss moves the level against it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

from fabric.core.request import Request

LEVEL = 0.8
ENOUGH = 20  # observations, before a node answers
MEMORY = 1024  # observations; then all counts are halved
MAX_NODES = 4096
STEP = 0.02  # of the level, at each miss or hit
EXACT = 16
WIDTH = log(1.1)

Key = tuple[str | int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Output tokens of one choice. `likely`: the mean; `high`: four of five stay at or below it.

    `depth`: how coarse the node was that answered (0: the finest).
    """

    likely: int
    high: int
    depth: int


class Lengths:
    """Estimates from what has finished; ask, then tell what came of it."""

    def __init__(self) -> None:
        self._nodes: dict[Key, _Node] = {(): _Node()}

    def estimate(self, request: Request) -> Estimate:
        """For a request that has just come."""
        most = request.sampling.max_tokens
        for depth, key in enumerate(_keys(request)):
            node = self._nodes.get(key)
            if node is not None and node.count >= ENOUGH:
                return Estimate(
                    likely=min(most, max(1, round(node.mean()))),
                    high=min(most, node.quantile(node.level)),
                    depth=depth,
                )
        # Nothing has been seen yet: half of what it may take, and all of it.
        return Estimate(likely=max(1, most // 2), high=most, depth=len(_keys(request)))

    def observe(self, request: Request, tokens: int) -> None:
        """One choice of the request ended by itself, or at max_tokens, after so many tokens."""
        for key in _keys(request):
            node = self._nodes.pop(key, None) or _Node()
            self._nodes[key] = node  # to the end: the first ones are the longest unused
            if node.count >= ENOUGH:
                high = min(request.sampling.max_tokens, node.quantile(node.level))
                node.correct(tokens <= high)
            node.add(tokens)
        while len(self._nodes) > MAX_NODES:
            del self._nodes[next(iter(self._nodes))]

    def check(self) -> None:
        """Memory is bounded, counts add up."""
        assert len(self._nodes) <= MAX_NODES, "too many nodes"
        for node in self._nodes.values():
            node.check()


class _Node:
    """A histogram that fades, and the level at which it is read."""

    __slots__ = ("_buckets", "_total", "count", "level")

    def __init__(self) -> None:
        self.count = 0
        self.level = LEVEL
        self._total = 0
        self._buckets: dict[int, int] = {}

    def add(self, tokens: int) -> None:
        """Count one output."""
        bucket = _bucket(tokens)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1
        self.count += 1
        self._total += tokens
        if self.count > MEMORY:
            self._buckets = {b: n // 2 for b, n in self._buckets.items() if n > 1}
            kept = sum(self._buckets.values())
            self._total = self._total * kept // self.count
            self.count = kept

    def correct(self, covered: bool) -> None:
        """The last answer held, or it did not."""
        self.level += STEP * (LEVEL - (1.0 if covered else 0.0))
        self.level = min(1.0, max(0.0, self.level))

    def mean(self) -> float:
        """Tokens."""
        return self._total / self.count

    def quantile(self, level: float) -> int:
        """The upper edge of the bucket where the share `level` is reached."""
        wanted = level * self.count
        seen = 0
        edge = 1
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            edge = _edge(bucket)
            if seen >= wanted:
                break
        return edge

    def check(self) -> None:
        """Counts add up."""
        assert self.count == sum(self._buckets.values()) <= MEMORY, "count"
        assert 0.0 <= self.level <= 1.0, "level"


def _keys(request: Request) -> tuple[Key, ...]:
    """From fine to coarse; the last is everything."""
    prompt = len(request.prompt).bit_length()
    most = request.sampling.max_tokens.bit_length()
    version, adapter = request.model_version, request.adapter
    return (
        (request.tenant, version, adapter, prompt, most),
        (version, adapter, prompt, most),
        (version, adapter),
        (),
    )


def _bucket(tokens: int) -> int:
    if tokens <= EXACT:
        return tokens
    return EXACT + ceil(log(tokens / EXACT) / WIDTH - 1e-9)


def _edge(bucket: int) -> int:
    if bucket <= EXACT:
        return bucket
    return int(EXACT * 1.1 ** (bucket - EXACT) + 1e-6)
