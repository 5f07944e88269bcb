"""How many replicas a pool should have, and why, in words.

Everything is measured in replicas' worth of work. How full a replica is, is what it is fullest of:
the time that prompts take, places, KV blocks; and never more than the time it is busy. That over
the target utilisation, summed, is the load; load over arrivals is what a token costs here; and so a
forecast of arrivals, or a queue, becomes a number of replicas too. The largest wish wins:

    load        what runs now                        missed    the SLO's error budget burns
    forecast    what will have arrived by then       queue     what waits, worked off in time

Steps up are immediate. A step down waits until fewer have been enough for `hold_s`, and for longer
than ever before: a pause is news only if it is thrice as long as any pause since the last change.
One that has to be taken back doubles `hold_s`, at most log2(hold_max / hold) times. So a constant
load settles however it is scattered. Another load is another matter: the wait is as it was.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, exp

from fabric.core.configs import AutoscalerConfig
from fabric.core.control.forecast import Forecaster
from fabric.core.snapshot import PoolSnapshot, ReplicaSnapshot

NS_PER_S = 1_000_000_000
# Fewer replicas are enough if they would be this much below the target utilisation.
SLACK = 0.85
# A wish of 2.1 replicas is 2: what is measured is no better than that.
TOLERANCE = 0.05
BURNING = 1.0
# Growth counts beyond this part of what arrivals scatter by: with scatter alone, a trend of half of
# it is a matter of three standard deviations.
SCATTER = 0.5
# The number of replicas goes by a load smoothed over so many look-backs; unless the quick one says
# that they would be fuller than this.
SLOW = 4
CROWDED = 0.9
# A step down is taken back if a step up follows within so many holds, at the same load: within
# this factor of it.
REGRET_HOLDS = 10
LONGER_THAN_ANY = 3
SAME_LOAD = 1.5


class Signal(StrEnum):
    """What decided."""

    LOAD = "load"
    FORECAST = "forecast"
    QUEUE = "queue"
    MISSED = "missed targets"
    IDLE = "idle"
    WAKE = "wake"
    LIMIT = "limit"
    HOLD = "hold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """So many replicas. `why` is a sentence for the log; `signal` is what counters count."""

    replicas: int
    why: str
    signal: Signal = Signal.LOAD


class Autoscaler:
    """One pool's. `decide` is called about once a second; more often does no harm."""

    def __init__(self, config: AutoscalerConfig) -> None:
        if not 0 <= config.min_replicas <= config.max_replicas or config.max_replicas < 1:
            raise ValueError("autoscaling needs 0 <= min_replicas <= max_replicas, and one at most")
        if not 0 < config.target_utilisation <= 1:
            raise ValueError("target_utilisation is a share above 0")
        self.config = config
        self.most = _most(config)
        self.hold_s = config.hold_s
        self._load = _Load(config)
        self._enough: deque[tuple[int, int]] = deque()  # (when, wish): falling, a sliding maximum
        self._needed: int | None = None  # when all were needed last, or the number changed
        self._pause = 0  # the longest between two such moments since the last change, ns
        self._active: int | None = None  # when there was last anything to do
        self._arrived = 0
        self._lowered: tuple[int, float] | None = None  # the last step down, and the load then
        self._pressed: int | None = None  # the last step up for missed targets

    def decide(self, pool: PoolSnapshot, now: int) -> Target:
        """The number of replicas for now. `pool.wanted` is taken for what was asked for last."""
        self._load.see(pool, now)
        if self._has_work(pool):
            self._active = now
        wish = self._wish(pool, now)
        fewer = min(max(self._load.fewer(), wish.replicas, self.config.min_replicas), self.most)
        self._remember(fewer, pool.wanted, now)
        target = self._settle(pool, wish, now)
        if target.replicas != pool.wanted:
            self._note_change(pool, target, now)
        return target

    def check(self) -> None:
        """The wait is within its bounds, the maximum is one, shares are shares."""
        config = self.config
        assert config.hold_s <= self.hold_s <= max(config.hold_max_s, config.hold_s), "hold"
        wishes = [wish for _, wish in self._enough]
        assert wishes == sorted(wishes, reverse=True), "the sliding maximum does not fall"
        assert len(set(wishes)) == len(wishes) <= self.most + 1, "more wishes than replicas"
        times = [when for when, _ in self._enough]
        assert times == sorted(times), "wishes out of order"
        self._load.check()

    # -- what is wished for ----------------------------------------------------------------------

    def _wish(self, pool: PoolSnapshot, now: int) -> Target:
        """The largest of all wishes, within the limits."""
        load = self._load
        full = f"{self.config.target_utilisation:.0%}"
        wishes = [
            Target(
                replicas=load.now(),
                why=f"the load fills {load.level:.2f} replicas at {full} each",
            ),
            self._foreseen(now),
            self._queued(pool),
        ]
        if pressed := self._missed(pool, now):
            wishes.append(pressed)
        best = max(wishes, key=lambda one: one.replicas)  # the first of equals
        if best.replicas > self.most:
            return Target(
                replicas=self.most,
                why=f"{best.why}; {self.most} is the most allowed",
                signal=Signal.LIMIT,
            )
        return best

    def _foreseen(self, now: int) -> Target:
        load, horizon_s = self._load, self.config.horizon_s
        foretold = load.forecaster.ahead(horizon_s, now)
        change = foretold.then_per_s - foretold.now_per_s - SCATTER * foretold.scatter_per_s
        growth = max(0.0, change) * load.replica_s_per_token
        level = load.level + growth / self.config.target_utilisation
        return Target(
            replicas=_whole(level),
            why=f"arrivals go from {foretold.now_per_s:,.0f} to {foretold.then_per_s:,.0f} tokens "
            f"a second in {horizon_s:.0f} s, which fills {level:.2f} replicas",
            signal=Signal.FORECAST,
        )

    def _queued(self, pool: PoolSnapshot) -> Target:
        load = self._load
        tokens = sum(one.waiting_tokens for one in pool.replicas)
        if load.full or not pool.shared_queue:  # else it waits for another pool
            tokens += pool.queued_tokens
        backlog_s = tokens * load.replica_s_per_token
        replicas = _whole(load.level + backlog_s / self.config.drain_s)
        signal = Signal.QUEUE
        if pool.queued_requests and not replicas:
            replicas = 1
            signal = Signal.WAKE
        return Target(
            replicas=replicas,
            why=f"{tokens:,} tokens wait, {backlog_s:.1f} s of one replica's work, beside a load "
            f"of {load.level:.2f}",
            signal=signal,
        )

    def _missed(self, pool: PoolSnapshot, now: int) -> Target | None:
        """One step up while targets are missed, then time to see what it brings."""
        if min(pool.burn_minute, pool.burn_ten_minutes) < BURNING or not pool.replicas:
            return None
        if len(pool.replicas) < pool.wanted:
            return None  # help is on its way
        cooldown_ns = int(self.config.cooldown_s * NS_PER_S)
        if self._pressed is not None and now - self._pressed < cooldown_ns:
            return None
        return Target(
            replicas=pool.wanted + max(1, pool.wanted // 5),
            why=f"targets are missed: the error budget burns {pool.burn_minute:.1f}-fold over a "
            f"minute, {pool.burn_ten_minutes:.1f}-fold over ten",
            signal=Signal.MISSED,
        )

    # -- from a wish to a number -----------------------------------------------------------------

    def _settle(self, pool: PoolSnapshot, wish: Target, now: int) -> Target:
        config, wanted = self.config, pool.wanted
        if wanted < config.min_replicas or wanted > self.most:
            bound = max(config.min_replicas, min(wanted, self.most))
            return Target(
                replicas=bound,
                why=f"{config.min_replicas} to {self.most} are allowed",
                signal=Signal.LIMIT,
            )
        if self._idle(now):
            why = f"nothing to do for {config.idle_s:.0f} s"
            return Target(replicas=0, why=why, signal=Signal.IDLE)
        if wish.replicas > wanted:
            return wish
        least = max(1, config.min_replicas) if wanted else 0
        enough = max(self._enough[0][1], least)
        if enough >= wanted:
            return Target(replicas=wanted, why=wish.why, signal=wish.signal)
        assert self._needed is not None, "decided without remembering"
        held_s = (now - self._needed) / NS_PER_S
        pause_s = min(LONGER_THAN_ANY * self._pause / NS_PER_S, config.hold_max_s)
        needed_s = max(self.hold_s, pause_s)
        if held_s < needed_s:
            why = f"{enough} would do, for {held_s:.0f} of the {needed_s:.0f} s that it takes"
            return Target(replicas=wanted, why=why, signal=Signal.HOLD)
        return Target(
            replicas=enough,
            why=f"{enough} have been enough for {held_s:.0f} s: {wish.why}",
            signal=Signal.LOAD,
        )

    def _idle(self, now: int) -> bool:
        if self.config.idle_s is None or self.config.min_replicas:
            return False
        return self._active is None or now - self._active >= int(self.config.idle_s * NS_PER_S)

    def _has_work(self, pool: PoolSnapshot) -> bool:
        total = pool.arrived_requests_total
        # At zero replicas nobody may tell of arrivals: a total that falls is no news then.
        came = total > self._arrived or (bool(pool.replicas) and total != self._arrived)
        if came:
            self._arrived = total
        running = any(one.running or one.waiting or one.swapped for one in pool.replicas)
        # A replica that loads counts as used, however long it takes: it is there for somebody.
        loading = len(pool.replicas) < pool.wanted
        first = self._active is None and pool.wanted > 0
        return first or loading or running or came or bool(pool.queued_requests)

    def _remember(self, wish: int, wanted: int, now: int) -> None:
        """A sliding maximum over the hold: older and smaller wishes don't matter any more."""
        if self._needed is None or wish >= wanted:
            self._pause = max(self._pause, 0 if self._needed is None else now - self._needed)
            self._needed = now
        while self._enough and self._enough[-1][1] <= wish:
            self._enough.pop()
        self._enough.append((now, wish))
        horizon = now - int(self.hold_s * NS_PER_S)
        while self._enough[0][0] < horizon:
            self._enough.popleft()

    def _note_change(self, pool: PoolSnapshot, target: Target, now: int) -> None:
        level = self._load.level
        if target.replicas < pool.wanted:
            if target.signal is Signal.LOAD:
                self._lowered = (now, level)
        elif self._lowered is not None:
            when, then = self._lowered
            same = max(level, then) <= SAME_LOAD * min(level, then)
            if same and now - when <= REGRET_HOLDS * int(self.hold_s * NS_PER_S):
                self.hold_s = min(2 * self.hold_s, max(self.config.hold_max_s, self.config.hold_s))
            elif not same:
                self.hold_s = self.config.hold_s
            self._lowered = None
        if target.signal is Signal.MISSED:
            self._pressed = now
        self._needed, self._pause = now, 0


class _Load:
    """How much work there is, smoothed; and what a token costs, in seconds of a full replica."""

    __slots__ = ("_arrived", "_at", "_config", "_queued", "_quick", "_replicas", "_spent_s",
                 "_tokens", "forecaster", "full", "level")  # fmt: skip

    def __init__(self, config: AutoscalerConfig) -> None:
        self._config = config
        self.forecaster = Forecaster(config.forecast)
        self.level = 0.0  # replicas at the target utilisation, slow
        self.full = False  # right now, by the target utilisation
        self._quick = 0.0
        self._at: int | None = None
        self._arrived: int | None = None
        self._queued = 0
        self._replicas: dict[str, tuple[ReplicaSnapshot, float]] = {}
        # Over about ten look-backs: what was spent, and the prompt tokens that it was spent on.
        self._spent_s = 0.0
        self._tokens = 0.0

    @property
    def replica_s_per_token(self) -> float:
        """Seconds of one full replica for each prompt token that arrives, its output included."""
        return self._spent_s / self._tokens if self._tokens >= 1.0 else 0.0

    def now(self) -> int:
        """Replicas that this load needs: at the target, or so as not to be crowded right now."""
        crowded = self._quick * self._config.target_utilisation / CROWDED
        return _whole(max(self.level, crowded))

    def fewer(self) -> int:
        """Replicas that would have some room to spare."""
        crowded = self._quick * self._config.target_utilisation / CROWDED
        return _whole(max(self.level, crowded) / SLACK)

    def see(self, pool: PoolSnapshot, now: int) -> None:
        """Take in a snapshot. The same one twice changes nothing but time."""
        total = pool.arrived_tokens_total
        if self._arrived is None or (pool.replicas and total < self._arrived):
            self._arrived = total  # the first, or fronts that began anew
        arrived = max(0, total - self._arrived)
        self._arrived = max(self._arrived, total)
        self.forecaster.add(float(arrived), now)
        seconds = 0.0 if self._at is None else max(0, now - self._at) / NS_PER_S
        self._at = now
        fullness = [self._fullness(one) for one in pool.replicas]
        tokens = sum(self._reached(one) for one in pool.replicas)
        if pool.shared_queue:  # by what was sent on: each pool has only its part of the work
            tokens = max(0, arrived + self._queued - pool.queued_tokens)
            self._queued = pool.queued_tokens
        self._replicas = {
            one.replica_id: (one, full) for one, full in zip(pool.replicas, fullness, strict=True)
        }
        level = sum(fullness) / self._config.target_utilisation
        self.full = level >= len(fullness)
        keep = exp(-seconds / self._config.look_back_s)
        self._quick = keep * self._quick + (1 - keep) * level
        keep = exp(-seconds / (SLOW * self._config.look_back_s))
        self.level = keep * self.level + (1 - keep) * level
        keep_long = exp(-seconds / (10 * self._config.look_back_s))
        self._spent_s = keep_long * self._spent_s + seconds * sum(fullness)
        self._tokens = keep_long * self._tokens + tokens

    def check(self) -> None:
        """Nothing is negative."""
        assert self.level >= 0 and self._spent_s >= 0 and self._tokens >= 0, "less than nothing"
        self.forecaster.check()

    def _fullness(self, now: ReplicaSnapshot) -> float:
        """0 to 1: of what it is fullest, and at most the share of time that it is busy."""
        kv = 1 - now.blocks_free / now.blocks_total if now.blocks_total else 0.0
        places = now.running / now.places if now.places else 0.0
        if now.replica_id not in self._replicas:
            return max(kv, places)
        before, full = self._replicas[now.replica_id]
        passed = now.taken - before.taken
        if passed <= 0:  # no news; an engine that has nothing to do has none to tell
            return full if now.running or now.waiting or now.swapped else 0.0
        busy = min(1.0, max(0, now.busy_ns_total - before.busy_ns_total) / passed)
        computed = max(0, now.prompt_tokens_total - before.prompt_tokens_total)
        prompts = min(1.0, computed * now.token_ns / passed)
        return min(busy, max(kv, places, prompts))

    def _reached(self, now: ReplicaSnapshot) -> int:
        """Prompt tokens that have got their turn, those found in the prefix cache included."""
        if now.replica_id not in self._replicas:
            return 0
        before, _ = self._replicas[now.replica_id]
        computed = now.prompt_tokens_total - before.prompt_tokens_total
        return max(0, computed + now.prefix_hits_total - before.prefix_hits_total)


def _most(config: AutoscalerConfig) -> int:
    if config.gpu_budget is None or not config.gpus:
        return config.max_replicas
    affordable = config.gpu_budget // config.gpus
    if affordable < max(1, config.min_replicas):
        raise ValueError(
            f"gpu_budget {config.gpu_budget} is less than the least number of replicas needs"
        )
    return min(config.max_replicas, affordable)


def _whole(replicas: float) -> int:
    return max(0, ceil(replicas - TOLERANCE * max(1.0, replicas)))
