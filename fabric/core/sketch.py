"""Quantiles of a stream in bounded memory, mergeable: DDSketch (Masson, Rim, Lee, VLDB 2019).

Bucket i counts values in (gamma^(i-1), gamma^i], gamma = (1+a)/(1-a). Its middle in ratio,
2*gamma^i/(gamma+1), is off by at most the factor a from anything in it. Merging adds counts, so
the sketch of a whole is the merge of the sketches of its parts, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log

from fabric.core.attainment import Quantiles

RELATIVE_ERROR = 0.02
_GAMMA = (1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR)
_LOG_GAMMA = log(_GAMMA)
# 1 ms to half an hour spans 360 buckets.
MAX_BUCKETS = 512
SMALLEST = 1e-6

Row = tuple[int, float, tuple[int, ...], tuple[int, ...]]


class Sketch:
    """Of values of 0 or more. `quantile` is within `RELATIVE_ERROR` of the true one (values below
    `SMALLEST` count as 0), unless it falls into what was collapsed: past `MAX_BUCKETS` the lowest
    become one, since it is the high quantiles that are asked for."""

    __slots__ = ("_buckets", "_collapsed", "_zeros", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._zeros = 0
        self._buckets: dict[int, int] = {}
        self._collapsed: int | None = None  # the bucket that holds what was collapsed, and its own

    def add(self, value: float) -> None:
        """Count one value. `ValueError`: it is negative."""
        if value < 0:
            raise ValueError(f"{value} is negative")
        self.count += 1
        self.total += value
        if value < SMALLEST:
            self._zeros += 1
            return
        self._put(ceil(log(value) / _LOG_GAMMA), 1)

    def merge(self, other: Sketch) -> None:
        """Take over all that `other` has seen."""
        self.count += other.count
        self.total += other.total
        self._zeros += other._zeros
        for bucket, count in other._buckets.items():
            self._put(bucket, count)
        if other._collapsed is not None:
            self._raise_floor(other._collapsed)

    def quantile(self, q: float) -> float:
        """The value at rank q * (count - 1), rounded down; 0 where nothing was seen."""
        if not 0 <= q <= 1:
            raise ValueError(f"{q} is not between 0 and 1")
        rank = int(q * (self.count - 1)) if self.count else 0
        seen = self._zeros
        if rank < seen or not self._buckets:
            return 0.0
        ordered = sorted(self._buckets)
        for bucket in ordered:
            seen += self._buckets[bucket]
            if rank < seen:
                return _middle(bucket)
        return _middle(ordered[-1])

    def quantiles(self) -> Quantiles:
        """The usual ones."""
        return Quantiles(
            count=self.count,
            total=self.total,
            p50=self.quantile(0.5),
            p90=self.quantile(0.9),
            p99=self.quantile(0.99),
        )

    def row(self) -> Row:
        """As plain tuples, to travel. Bucket 0 of the row is the collapsed one's place."""
        ordered = sorted(self._buckets)
        floor = () if self._collapsed is None else (self._collapsed,)
        counts = tuple(self._buckets[bucket] for bucket in ordered)
        return (self._zeros, self.total, (*floor, *ordered), counts)

    @staticmethod
    def of_row(row: Row) -> Sketch:
        """The inverse of `row`."""
        zeros, total, places, counts = row
        made = Sketch()
        if len(places) > len(counts):
            made._collapsed = places[0]
            places = places[1:]
        made._zeros = zeros
        made.total = total
        made._buckets = dict(zip(places, counts, strict=True))
        made.count = zeros + sum(counts)
        return made

    def check(self) -> None:
        """Counts add up, memory is bounded, nothing lies below the floor."""
        assert self.count == self._zeros + sum(self._buckets.values()), "count"
        assert len(self._buckets) <= MAX_BUCKETS, "too many buckets"
        assert all(count > 0 for count in self._buckets.values()), "an empty bucket"
        assert self._collapsed is None or min(self._buckets) >= self._collapsed, "below the floor"

    def _put(self, bucket: int, count: int) -> None:
        if self._collapsed is not None and bucket < self._collapsed:
            bucket = self._collapsed
        self._buckets[bucket] = self._buckets.get(bucket, 0) + count
        if len(self._buckets) > MAX_BUCKETS:
            lowest: Sequence[int] = sorted(self._buckets)[:2]
            self._raise_floor(lowest[1])

    def _raise_floor(self, floor: int) -> None:
        """Move all that lies below into the bucket `floor`."""
        if self._collapsed is not None and floor <= self._collapsed:
            return
        below = [bucket for bucket in self._buckets if bucket < floor]
        moved = sum(self._buckets.pop(bucket) for bucket in below)
        if moved:
            self._buckets[floor] = self._buckets.get(floor, 0) + moved
        self._collapsed = floor


def _middle(bucket: int) -> float:
    return float(2 * _GAMMA**bucket / (_GAMMA + 1))


def merged(sketches: Sequence[Sketch]) -> Sketch:
    """One sketch of all of them."""
    whole = Sketch()
    for sketch in sketches:
        whole.merge(sketch)
    return whole
