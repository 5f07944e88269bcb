"""How many replicas: enough for what runs, waits, is foretold or missed; and no flapping."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from kit.pool_model import NS_PER_S, PoolModel

from fabric.core.configs import AutoscalerConfig, ForecastConfig
from fabric.core.control.autoscaler import Autoscaler, Signal
from fabric.core.control.forecast import Forecaster

CONFIG = AutoscalerConfig(min_replicas=1, max_replicas=20)
HOUR_S = 3600


LOADS = given(
    work=st.floats(0.05, 12.0),
    noise=st.floats(0.0, 0.3),
    seed=st.integers(0, 1000),
    start=st.integers(1, 20),
)
# A failure takes hours of virtual time to show; looking for a simpler one takes minutes of ours.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@settings(max_examples=3, deadline=None, phases=PHASES, derandomize=True)
@LOADS
def test_a_constant_load_settles_and_then_nothing_changes(
    work: float, noise: float, seed: int, start: int
) -> None:
    constant_load(work, noise, seed, start)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@settings(max_examples=500, deadline=None, phases=PHASES)
@LOADS
def test_a_constant_load_settles_for_long(work: float, noise: float, seed: int, start: int) -> None:
    constant_load(work, noise, seed, start)


def constant_load(work: float, noise: float, seed: int, start: int) -> None:
    noise /= math.sqrt(max(1.0, work))  # many requests scatter less, relatively
    pool = PoolModel(CONFIG, replicas=start, noise=noise, seed=seed)
    pool.run(work, 2 * HOUR_S, step=5)
    settled = len(pool.changes)
    pool.run(work, 2 * HOUR_S, step=5)
    assert pool.changes[settled:] == [], "it flaps"
    assert pool.ready >= work, "too few"
    most = (1 + 2 * noise) * work / CONFIG.target_utilisation / 0.85
    assert pool.ready <= math.ceil(most) + 1, "too many"


@given(work=st.floats(0.1, 12.0))
@settings(max_examples=5, deadline=None)
def test_a_burst_is_worked_off_and_given_back(work: float) -> None:
    pool = PoolModel(CONFIG)
    pool.run(0.3, 200)
    assert pool.wanted == 1
    pool.run(work, 300)
    assert pool.wanted >= min(20, work), "never enough"
    assert pool.backlog < 100, "the queue was not worked off"
    pool.run(0.3, HOUR_S, step=10)
    assert pool.wanted == 1, "not given back"


def test_a_step_up_is_immediate_and_a_step_down_is_not() -> None:
    pool = PoolModel(CONFIG)
    pool.run(0.3, 100)
    pool.run(4.0, 60)
    second, _, up = pool.changes[0]
    assert second <= 105
    assert up.signal in (Signal.QUEUE, Signal.LOAD, Signal.FORECAST)
    pool.changes.clear()
    pool.run(0.3, 400)
    second, _, down = pool.changes[0]
    assert second >= 160 + CONFIG.hold_s
    assert down.signal is Signal.LOAD
    assert "have been enough for" in down.why


def test_growth_is_met_before_it_is_there() -> None:
    """The same ramp with and without a look ahead: with it, replicas come earlier."""

    def third_at(horizon_s: float) -> int:
        pool = PoolModel(replace(CONFIG, horizon_s=horizon_s))
        for second in range(900):
            pool.tick(0.5 + second * 2.5 / 900)
        return next(when for when, _, target in pool.changes if target.replicas >= 3)

    assert third_at(60.0) <= third_at(0.0) - 20


def test_a_pool_with_a_part_of_the_work_is_sized_for_its_part() -> None:
    """One token in ten is computed here: a burst and a ramp cost what they cost a pool alone."""

    def changes(part: float) -> list[tuple[int, int, int]]:
        pool = PoolModel(CONFIG, part=part)
        pool.run(0.5, 200)
        pool.run(4.0, 100)
        for second in range(600):
            pool.tick(0.5 + second * 2.5 / 600)
        return [(when, before, target.replicas) for when, before, target in pool.changes]

    assert changes(0.1) == changes(1.0) != []


def test_a_queue_counts_for_the_pool_that_it_waits_for() -> None:
    def wish(work: float, *, shared: bool) -> int:
        pool = PoolModel(CONFIG)
        pool.run(work, 200)
        crowd = replace(pool._pool(), queued_tokens=100_000, queued_requests=50)
        seen = replace(crowd, shared_queue=shared, wanted=pool.wanted)
        return pool.autoscaler.decide(seen, pool.now + 1).replicas

    assert wish(0.3, shared=False) > 1, "whoever is behind it, there is one pool only"
    assert wish(0.3, shared=True) == 1, "with room to spare it is not for this one"
    assert wish(0.75, shared=True) > 2


def test_missed_targets_add_one_then_wait() -> None:
    pool = PoolModel(CONFIG, replicas=2)
    pool.run(1.0, 100)
    assert pool.changes == []
    pool.burn = 2.0
    pool.run(1.0, 59)
    assert [(before, new.replicas, new.signal) for _, before, new in pool.changes] == [
        (2, 3, Signal.MISSED)
    ]
    assert "error budget burns 2.0-fold" in pool.changes[0][2].why
    pool.run(1.0, 10)
    assert pool.wanted == 4, "still missed after the cool-down"
    pool.burn = 0.5
    pool.run(1.0, 100)
    assert pool.wanted == 4


def test_idle_to_zero_and_a_request_wakes_it() -> None:
    config = AutoscalerConfig(min_replicas=0, max_replicas=4, idle_s=60.0)
    pool = PoolModel(config)
    pool.run(0.2, 100)
    assert pool.wanted == 1
    pool.run(0.0, 58)
    assert pool.wanted == 1
    pool.run(0.0, 10)
    assert pool.wanted == 0
    assert pool.changes[-1][2].why == "nothing to do for 60 s"
    pool.run(0.0, 200)
    assert pool.wanted == 0
    target = pool.tick(0.2)
    assert (target.replicas, pool.wanted) == (1, 1)
    assert target.signal in (Signal.WAKE, Signal.QUEUE)


def test_at_zero_the_load_of_before_starts_nobody() -> None:
    pool = PoolModel(AutoscalerConfig(min_replicas=0, max_replicas=4, idle_s=5.0))
    pool.run(0.6, 100)
    pool.run(0.0, 7)
    assert pool.wanted == 0
    changes = len(pool.changes)
    pool.run(0.0, 60)
    assert (pool.wanted, len(pool.changes)) == (0, changes)


def test_a_replica_that_loads_for_long_is_not_idle() -> None:
    pool = PoolModel(AutoscalerConfig(min_replicas=0, max_replicas=4, idle_s=5.0), replicas=0)
    pool.cold_start_s = 60
    pool.run(0.2, 1)
    assert pool.wanted == 1
    pool.backlog = 0.0  # its client has left
    pool.run(0.0, 62)
    assert (pool.wanted, pool.ready) == (1, 1)
    pool.run(0.0, 10)
    assert pool.wanted == 0


def test_with_a_minimum_idle_is_no_reason() -> None:
    pool = PoolModel(replace(CONFIG, min_replicas=2, idle_s=10.0), replicas=2)
    pool.run(0.0, 300)
    assert pool.wanted == 2


def test_limits_and_the_gpu_budget_bind() -> None:
    pool = PoolModel(replace(CONFIG, max_replicas=10, gpus=4, gpu_budget=14))
    target = pool.run(9.0, 60)
    assert (target.replicas, target.signal) == (3, Signal.LIMIT)
    assert "3 is the most allowed" in target.why
    outside = PoolModel(replace(CONFIG, min_replicas=2, max_replicas=3), replicas=5)
    assert outside.tick(0.1).replicas == 3
    with pytest.raises(ValueError, match="gpu_budget"):
        Autoscaler(replace(CONFIG, gpus=8, gpu_budget=4))


def test_the_same_snapshots_give_the_same_decisions() -> None:
    pools = [PoolModel(CONFIG, noise=0.3, seed=5) for _ in range(2)]
    for work in (0.5, 3.0, 0.2):
        for pool in pools:
            pool.run(work, 200)
    assert pools[0].changes == pools[1].changes != []


def test_a_trend_is_followed_and_damped() -> None:
    forecaster = Forecaster(ForecastConfig())
    for second in range(600):
        forecaster.add(100.0 + second, second * NS_PER_S)
    found = forecaster.ahead(30.0, 600 * NS_PER_S)
    # One token a second more in every second; a step of smoothing lags by about 20 s.
    assert 650 <= found.now_per_s <= 700
    assert found.now_per_s + 10 <= found.then_per_s <= found.now_per_s + 30
    forecaster.check()


def test_a_season_is_known_after_one_period() -> None:
    """Two levels a day, each half of it: the change is foretold on the second day."""
    config = ForecastConfig(bucket_s=10.0, slot_s=100.0, period_s=1000.0)
    forecaster = Forecaster(config)

    def rate(second: int) -> float:
        return 300.0 if second % 1000 >= 500 else 100.0

    for second in range(2440):
        forecaster.add(rate(second), second * NS_PER_S)
        forecaster.check()
    before = forecaster.ahead(120.0, 2440 * NS_PER_S)
    assert before.now_per_s == pytest.approx(100.0, rel=0.05)
    assert before.then_per_s > 220.0
    first_day = Forecaster(config)
    for second in range(440):
        first_day.add(rate(second), second * NS_PER_S)
    assert first_day.ahead(120.0, 440 * NS_PER_S).then_per_s == pytest.approx(100.0, rel=0.05)


def test_a_clock_that_jumps_is_survived() -> None:
    forecaster = Forecaster(ForecastConfig())
    forecaster.add(100.0, 1000 * NS_PER_S)
    forecaster.add(100.0, 900 * NS_PER_S)
    forecaster.add(100.0, 10**9 * NS_PER_S)
    forecaster.check()
    assert forecaster.ahead(30.0, 10**9 * NS_PER_S + NS_PER_S).then_per_s >= 0
