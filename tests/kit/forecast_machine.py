"""`Forecaster` against a diary: what it knows is worked out anew from all that arrived."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.core.configs import ForecastConfig
from fabric.core.control.forecast import Forecaster

NS_PER_S = 1_000_000_000
# Four slots of two buckets: a season is complete within a few rules.
CONFIG = ForecastConfig(
    bucket_s=1.0,
    slot_s=2.0,
    period_s=8.0,
    level_share=0.5,
    trend_share=0.25,
    damping=0.5,
    season_share=0.5,
)
IN_SLOT, SLOTS = 2, 4
Rates = Sequence[float]


def smoothed(rates: Rates) -> tuple[float, float]:
    """Level and trend after these buckets (Gardner and McKenzie's equations)."""
    level, trend = rates[0], 0.0
    for rate in rates[1:]:
        before, expected = level, level + 0.5 * trend
        level = max(0.0, 0.5 * rate + 0.5 * expected)
        trend = 0.25 * (level - before) + 0.75 * 0.5 * trend
    return level, trend


def seasonal(slots: Sequence[tuple[int, float]]) -> list[float]:
    """Each slot's distance from the mean: none before all were seen (Winters' equations)."""
    first: dict[int, float] = {}
    change, mean = [0.0] * SLOTS, 0.0
    for slot, rate in slots:
        if len(first) < SLOTS:
            first[slot] = rate
            if len(first) == SLOTS:
                mean = sum(first.values()) / SLOTS
                change = [first[one] - mean for one in range(SLOTS)]
            continue
        level = mean + 0.5 * (rate - change[slot] - mean) / SLOTS
        change[slot] = 0.5 * (rate - level) + 0.5 * change[slot]
        mean = level
    return change


class ForecastMachine(RuleBasedStateMachine):
    """Work arrives, or none does; the clock goes on, stands, leaps, and is set back."""

    @initialize(start=st.integers(0, 30))
    def build(self, start: int) -> None:
        self.forecaster = Forecaster(CONFIG)
        self.now = start * NS_PER_S // 4
        self.bucket: int | None = None  # the first one of the diary
        self.diary: list[float] = []  # work by bucket, the one in hand last
        self.slots: list[tuple[int, float]] = []  # complete ones; they outlive the diary

    @rule(work=st.integers(0, 40), times=st.integers(1, 3))
    def arrives(self, work: int, times: int) -> None:
        self.turn()
        for _ in range(times):
            self.forecaster.add(float(work), self.now)
            self.diary[-1] += work

    @rule(quarters=st.integers(0, 12))
    def passes(self, quarters: int) -> None:
        self.now += quarters * NS_PER_S // 4

    @rule(rates=st.lists(st.integers(0, 40), min_size=2, max_size=10))
    def goes_on(self, rates: list[int]) -> None:
        """A bucket each."""
        for rate in rates:
            self.now += NS_PER_S
            self.arrives(rate, 1)

    @rule(seconds=st.sampled_from([-9, -1, 8, 9, 10, 400]))
    def leaps(self, seconds: int) -> None:
        self.now = max(0, self.now + seconds * NS_PER_S)

    @rule(quarters=st.integers(0, 40))
    def is_asked(self, quarters: int) -> None:
        self.turn()
        found = self.forecaster.ahead(quarters / 4, self.now)
        done = self.diary[:-1]
        level, trend = smoothed(done) if done else (0.0, 0.0)
        assert found.now_per_s == pytest.approx(level), "the rate of now"
        change = seasonal(self.slots)
        further = 0.5 * (1 - 0.5 ** (quarters / 4)) / 0.5
        then = max(0.0, level + trend * further)
        then += self.season(change, quarters) - self.season(change, 0)
        assert found.then_per_s == pytest.approx(max(0.0, then)), "the rate of then"
        if len(set(done)) <= 1:
            assert found.scatter_per_s == 0.0, "what is steady does not scatter"

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "forecaster"):
            self.forecaster.check()

    def season(self, change: list[float], quarters: int) -> float:
        """Between the middles of two slots, so long from now."""
        place = (self.now / NS_PER_S + quarters / 4) / 2 % SLOTS - 0.5
        low = int(place // 1)
        part = place - low
        return (1 - part) * change[low % SLOTS] + part * change[(low + 1) % SLOTS]

    def turn(self) -> None:
        """Close the diary's buckets that are over."""
        number = self.now // NS_PER_S
        last = None if self.bucket is None else self.bucket + len(self.diary) - 1
        if last is None or number < last or number - last > SLOTS * IN_SLOT:
            self.bucket, self.diary = number, [0.0]
            return
        for bucket in range(last, number):
            if bucket % IN_SLOT == IN_SLOT - 1:
                mine = self.diary[-IN_SLOT:]  # fewer if the diary began in the middle
                self.slots.append((bucket // IN_SLOT % SLOTS, sum(mine) / len(mine)))
            self.diary.append(0.0)
