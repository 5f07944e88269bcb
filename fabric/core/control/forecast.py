"""How much work will arrive a little later: a trend for the next minute, a season for the day.

Two exponential smoothings. The quick one (Holt 1957, its trend damped after Gardner and McKenzie
1985) follows buckets of ten seconds: where the rate is and where it goes. The slow one (Winters
1960, additive) has a value for each slot of the period: what usually changes between now and then.
What is foretold is the quick level with its trend, plus that change. A season is believed after a
whole period has been seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.configs import ForecastConfig

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Work a second, now and at the horizon (never below 0). `scatter_per_s`: how far single
    buckets are off, on average: a change well below it may be none."""

    now_per_s: float
    then_per_s: float
    scatter_per_s: float


class Forecaster:
    """Told of every arrival's work, asked for a rate. Memory: one number for each slot."""

    def __init__(self, config: ForecastConfig) -> None:
        if min(config.bucket_s, config.slot_s, config.period_s) <= 0:
            raise ValueError("bucket, slot and period must be longer than nothing")
        if config.period_s % config.slot_s or config.slot_s % config.bucket_s:
            raise ValueError("a period is made of whole slots, and a slot of whole buckets")
        self.config = config
        self._quick = _Holt(config)
        self._season = _Season(round(config.period_s / config.slot_s), config.season_share)
        self._slot_work = 0.0
        self._slot_buckets = 0
        self._bucket_work = 0.0
        self._bucket: int | None = None  # number of the bucket in hand, since time 0

    def add(self, work: float, now: int) -> None:
        """So much has arrived just now."""
        self._advance(now)
        self._bucket_work += work

    def ahead(self, horizon_s: float, now: int) -> Forecast:
        """The rate now and after `horizon_s`."""
        self._advance(now)
        now_per_s = self._quick.at(0.0)
        then_per_s = self._quick.at(horizon_s / self.config.bucket_s)
        then = now + int(horizon_s * NS_PER_S)
        change = self._season.at(self._place(then)) - self._season.at(self._place(now))
        return Forecast(
            now_per_s=now_per_s,
            then_per_s=max(0.0, then_per_s + change),
            scatter_per_s=self._quick.scatter,
        )

    def check(self) -> None:
        """Rates are rates; what is in hand belongs to one slot."""
        assert self._bucket_work >= 0, "less than nothing has arrived"
        assert 0 <= self._slot_buckets < self._buckets_in_slot, "a slot was not closed"
        assert self._quick.level >= 0, "a negative rate"
        assert len(self._season.change) == self._season.slots, "a slot is missing"

    @property
    def _buckets_in_slot(self) -> int:
        return round(self.config.slot_s / self.config.bucket_s)

    def _place(self, when: int) -> float:
        """Where in the season, in slots; 0.5 is the middle of the first."""
        return when / (self.config.slot_s * NS_PER_S) % self._season.slots

    def _advance(self, now: int) -> None:
        """Close all buckets that are over. After a long silence their levels are all the same."""
        number = now // int(self.config.bucket_s * NS_PER_S)
        if self._bucket is None:
            self._bucket = number
        # A clock that was set back, or a pause of more than a period: nothing can be told of it.
        if number < self._bucket or number - self._bucket > self._season.slots * (
            self._buckets_in_slot
        ):
            self._bucket, self._bucket_work = number, 0.0
            self._slot_buckets, self._slot_work = 0, 0.0
            self._quick = _Holt(self.config)
        while self._bucket < number:
            rate = self._bucket_work / self.config.bucket_s
            self._quick.see(rate)
            self._slot_work += rate
            self._slot_buckets += 1
            if (self._bucket + 1) % self._buckets_in_slot == 0:
                slot = self._bucket // self._buckets_in_slot % self._season.slots
                self._season.see(slot, self._slot_work / self._slot_buckets)
                self._slot_work, self._slot_buckets = 0.0, 0
            self._bucket_work = 0.0
            self._bucket += 1


class _Holt:
    """Level and damped trend, per bucket."""

    __slots__ = (
        "_damping",
        "_lag",
        "_level_share",
        "_seen",
        "_trend_share",
        "level",
        "scatter",
        "trend",
    )

    def __init__(self, config: ForecastConfig) -> None:
        self.level = 0.0
        self.trend = 0.0
        self.scatter = 0.0  # mean distance of a bucket from what was expected of it
        self._lag = 0.0
        self._level_share = config.level_share
        self._trend_share = config.trend_share
        self._damping = config.damping
        self._seen = False

    def see(self, rate: float) -> None:
        """The next bucket's rate."""
        if not self._seen:
            self._seen, self.level = True, rate
            return
        expected = self.level + self._damping * self.trend
        error = rate - expected  # on a steady ramp it is always the same: that is no scatter
        self._lag += self._trend_share * (error - self._lag)
        self.scatter += self._trend_share * (abs(error - self._lag) - self.scatter)
        level = expected + self._level_share * (rate - expected)
        level = max(level, 0.0)
        change = level - self.level
        self.trend = self._damping * self.trend + self._trend_share * (
            change - self._damping * self.trend
        )
        self.level = level

    def at(self, buckets: float) -> float:
        """The rate so many buckets later: damping + damping² + ... trends further on."""
        damping = self._damping
        sum_of_powers = damping * (1.0 - float(damping**buckets)) / (1.0 - damping)
        return max(0.0, self.level + self.trend * sum_of_powers)


class _Season:
    """Each slot's usual distance from the period's mean."""

    __slots__ = ("_first", "_mean", "_share", "change", "slots")

    def __init__(self, slots: int, share: float) -> None:
        self.slots = slots
        self.change = [0.0] * slots
        self._share = share
        self._mean = 0.0
        self._first: dict[int, float] | None = {}  # the first period, until it is complete

    def see(self, slot: int, rate: float) -> None:
        """A slot is over."""
        if self._first is not None:
            self._first[slot] = rate
            if len(self._first) == self.slots:
                self._mean = sum(self._first.values()) / self.slots
                self.change = [self._first[index] - self._mean for index in range(self.slots)]
                self._first = None
            return
        level = self._mean + self._share * (rate - self.change[slot] - self._mean) / self.slots
        self.change[slot] += self._share * (rate - level - self.change[slot])
        self._mean = level

    def at(self, place: float) -> float:
        """Linear between the middles of two slots."""
        position = place - 0.5
        low = int(position // 1)
        part = position - low
        return (1 - part) * self.change[low % self.slots] + part * self.change[
            (low + 1) % self.slots
        ]
