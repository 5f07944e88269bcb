"""The ledger: how well each tier, tenant, version and adapter is served, in bounded memory.

    outcome ──> counts in slices of 5 s ───┐                      ┌─> attainment, burn, goodput
           └──> sketches in slices of 60 s ┴─> page ──> merged ───┴─> quantiles

Every dispatcher keeps a ledger of its own requests and publishes its `page`; a page is what is
left of a window, so pages of several dispatchers are merged by adding, and one that dies takes with
it what it alone had seen. A window is exact to a slice: one minute is the slice in hand and the
eleven before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fabric.core.attainment import (
    Dimension,
    Outcome,
    Series,
    SloSnapshot,
    Window,
)
from fabric.core.sketch import Row, Sketch, merged
from fabric.core.tiers import Tier

NS_PER_S = 1_000_000_000
SLICE_S, MINUTE_SLICES, SLICES = 5, 12, 120
SKETCH_SLICE_S, SKETCH_SLICES = 60, 10
# A client invents no tenants or adapters, but an operator may have thousands.
MAX_NAMES = 64
OTHER = "(other)"
METRICS = ("queue_wait_s", "ttft_s", "tpot_s", "e2e_s")

Name = tuple[Dimension, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What a window holds. `good_tokens`: of requests that were met."""

    requests: int = 0
    refused: int = 0
    met: int = 0
    good_tokens: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts(
            requests=self.requests + other.requests,
            refused=self.refused + other.refused,
            met=self.met + other.met,
            good_tokens=self.good_tokens + other.good_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One series on a page. `sketches`: rows, in the order of `METRICS`, of ten minutes."""

    dimension: Dimension
    name: str
    minute: Counts
    ten_minutes: Counts
    sketches: tuple[Row, ...]


Page = tuple[Entry, ...]


class Ledger:
    """One dispatcher's book. `objective`: the share of requests that is promised to be met."""

    def __init__(self, tiers: Sequence[Tier], *, objective: float) -> None:
        if not 0 < objective < 1:
            raise ValueError("the objective is a share between 0 and 1")
        self._tiers = {tier.name: tier for tier in tiers}
        self._objective = objective
        self._books: dict[Name, _Book] = {}

    def observe(self, outcome: Outcome, now: int) -> bool:
        """Count a request that is over; was it met? `ValueError`: there is no such tier."""
        tier = self._tiers.get(outcome.tier)
        if tier is None:
            raise ValueError(f"no tier {outcome.tier!r}")
        met = is_met(outcome, tier)
        for dimension, name in (
            (Dimension.TIER, outcome.tier),
            (Dimension.TENANT, outcome.tenant),
            (Dimension.VERSION, outcome.version),
            (Dimension.ADAPTER, outcome.adapter or ""),
        ):
            self._book(dimension, name, now).add(outcome, met, now)
        return met

    def page(self, now: int) -> Page:
        """What is left of the last ten minutes, tiers first; to be merged with others' pages."""
        entries = []
        order = list(Dimension)
        for key in sorted(self._books, key=lambda name: (order.index(name[0]), name[1])):
            book = self._books[key]
            book.forget(now)
            if book.empty:
                del self._books[key]
            else:
                entries.append(book.entry(*key, now))
        return tuple(entries)

    def snapshot(self, pages: Iterable[Page], now: int) -> SloSnapshot:
        """All these pages as one."""
        return snapshot_of(pages, self._objective, now)

    def check(self) -> None:
        """Memory is bounded; every dimension has counted the same requests."""
        totals = []
        for dimension in Dimension:
            books = [book for (kind, _), book in self._books.items() if kind is dimension]
            assert len(books) <= MAX_NAMES + 1, "too many names"
            totals.append(sum(book.total().requests for book in books))
        assert len(set(totals)) == 1, "a request is missing in a dimension"
        for book in self._books.values():
            book.check()

    def _book(self, dimension: Dimension, name: str, now: int) -> _Book:
        book = self._books.get((dimension, name))
        if book is None:
            same = [key for key in self._books if key[0] is dimension]
            if len(same) >= MAX_NAMES:
                for key in same:  # those of whom nothing has been heard for long make room
                    self._books[key].forget(now)
                    if self._books[key].empty:
                        del self._books[key]
                same = [key for key in same if key in self._books]
            if len(same) >= MAX_NAMES:
                name = OTHER
            book = self._books.setdefault((dimension, name), _Book())
        return book


def snapshot_of(pages: Iterable[Page], objective: float, now: int) -> SloSnapshot:
    """Pages of several dispatchers as one. `objective`: the share that is promised to be met."""
    found: dict[Name, list[Entry]] = {}
    for page in pages:
        for entry in page:
            found.setdefault((entry.dimension, entry.name), []).append(entry)
    order = list(Dimension)
    names = sorted(found, key=lambda name: (order.index(name[0]), name[1]))
    series = tuple(_series(name, found[name], objective) for name in names)
    return SloSnapshot(taken=now, series=series)


def _series(name: Name, entries: list[Entry], objective: float) -> Series:
    minute, ten = Counts(), Counts()
    for entry in entries:
        minute, ten = minute.plus(entry.minute), ten.plus(entry.ten_minutes)
    wait, ttft, tpot, e2e = [
        merged([Sketch.of_row(entry.sketches[i]) for entry in entries]).quantiles()
        for i in range(len(METRICS))
    ]
    return Series(
        dimension=name[0],
        name=name[1],
        minute=_window(minute, MINUTE_SLICES * SLICE_S, objective),
        ten_minutes=_window(ten, SLICES * SLICE_S, objective),
        queue_wait=wait,
        ttft=ttft,
        tpot=tpot,
        e2e=e2e,
    )


def _window(counts: Counts, seconds: float, objective: float) -> Window:
    attainment = counts.met / counts.requests if counts.requests else 1.0
    return Window(
        seconds=seconds,
        requests=counts.requests,
        refused=counts.refused,
        met=counts.met,
        attainment=attainment,
        burn_rate=(1 - attainment) / (1 - objective),
        goodput_per_s=counts.met / seconds,
        good_tokens_per_s=counts.good_tokens / seconds,
    )


def is_met(outcome: Outcome, tier: Tier) -> bool:
    """All targets of the tier, and the deadline."""
    if outcome.refused or outcome.ttft_s is None or outcome.e2e_s is None:
        return False
    in_pace = outcome.tpot_s is None or outcome.tpot_s * 1000 <= tier.tpot_ms
    return outcome.deadline_kept and outcome.ttft_s * 1000 <= tier.ttft_ms and in_pace


@dataclass(slots=True)
class _Slice:
    """`number`: which one since the epoch of the clock."""

    number: int
    counts: Counts


@dataclass(slots=True)
class _SketchSlice:
    number: int
    sketches: tuple[Sketch, ...]


class _Book:
    """One series: slices of the last ten minutes, oldest first."""

    __slots__ = ("_sketches", "_slices")

    def __init__(self) -> None:
        self._slices: deque[_Slice] = deque()
        self._sketches: deque[_SketchSlice] = deque()

    @property
    def empty(self) -> bool:
        """Nothing is left of ten minutes."""
        return not self._slices and not self._sketches

    def add(self, outcome: Outcome, met: bool, now: int) -> None:
        """Count one request."""
        self.forget(now)
        # A clock that steps back counts into the newest slice: slices stay in order.
        number = now // (SLICE_S * NS_PER_S)
        if not self._slices or self._slices[-1].number < number:
            self._slices.append(_Slice(number, Counts()))
        one = Counts(
            requests=1,
            refused=int(outcome.refused),
            met=int(met),
            good_tokens=outcome.tokens if met else 0,
        )
        self._slices[-1].counts = self._slices[-1].counts.plus(one)
        number = now // (SKETCH_SLICE_S * NS_PER_S)
        if not self._sketches or self._sketches[-1].number < number:
            self._sketches.append(_SketchSlice(number, tuple(Sketch() for _ in METRICS)))
        for metric, sketch in zip(METRICS, self._sketches[-1].sketches, strict=True):
            value = getattr(outcome, metric)
            if value is not None:
                sketch.add(max(0.0, value))

    def forget(self, now: int) -> None:
        """Drop the slices that ten minutes have passed over."""
        oldest = now // (SLICE_S * NS_PER_S) - SLICES + 1
        while self._slices and self._slices[0].number < oldest:
            self._slices.popleft()
        oldest = now // (SKETCH_SLICE_S * NS_PER_S) - SKETCH_SLICES + 1
        while self._sketches and self._sketches[0].number < oldest:
            self._sketches.popleft()

    def entry(self, dimension: Dimension, name: str, now: int) -> Entry:
        """As of now, forgotten what is to be forgotten."""
        return Entry(
            dimension=dimension,
            name=name,
            minute=self.total(now // (SLICE_S * NS_PER_S) - MINUTE_SLICES + 1),
            ten_minutes=self.total(),
            sketches=tuple(
                merged([one.sketches[i] for one in self._sketches]).row()
                for i in range(len(METRICS))
            ),
        )

    def total(self, since: int = 0) -> Counts:
        """The sum over the slices from number `since` on."""
        whole = Counts()
        for one in self._slices:
            if one.number >= since:
                whole = whole.plus(one.counts)
        return whole

    def check(self) -> None:
        """Slices are in order, and no more than fit in."""
        for numbers, most in (
            ([one.number for one in self._slices], SLICES),
            ([one.number for one in self._sketches], SKETCH_SLICES),
        ):
            assert numbers == sorted(set(numbers)), "slices out of order"
            assert not numbers or numbers[-1] - numbers[0] < most, "too long a window"
        for one in self._sketches:
            for sketch in one.sketches:
                sketch.check()
