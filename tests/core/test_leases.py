"""Limits and fair shares over three dispatchers, one dying: never more, never far behind."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.lease_machine import LeaseMachine
from kit.lease_world import LARGEST, OUTPUT, TENANTS, TIERS, LeaseWorld
from kit.planting import constant, planted

from fabric.core.control import leases as leases_module
from fabric.core.control.leases import LeaseSplit
from fabric.core.lease import Demand, Flow
from fabric.core.traffic.admission import cost

EVERYWHERE = dict.fromkeys(("few", "slow", "light", "heavy"), (0, 1, 2))
# Each one's requests come to dispatchers that the other's do not come to.
APART = {"heavy": (0,), "light": (1, 2)}
SEEDS = st.integers(0, 10_000)

TestLeases = LeaseMachine.TestCase
TestLeases.settings = settings(max_examples=12, stateful_step_count=30)


@given(SEEDS, st.integers(15, 45))
@settings(max_examples=4)
def test_limits_hold_in_sum_whatever_is_lost_or_dies(seed: int, dies_at: int) -> None:
    LeaseWorld(seed, EVERYWHERE, places=6).run(90, dies_at)


def gap_of(seed: int, dies_at: int | None, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """How far "heavy" is behind "light" after 60 s, and how far it may be."""
    monkeypatch.setattr(leases_module, "ALLOWANCE", 100.0)
    world = LeaseWorld(seed, APART, places=2)
    world.run(600, dies_at)
    gap = world.served["heavy"] / 2.0 - world.served["light"] / 1.0
    largest = cost(LARGEST, OUTPUT)
    bound = largest / 2 + largest + 3 * (world.allowance + largest)
    return gap, bound


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dies_at", [None, 300])
def test_no_tenant_falls_behind_elsewhere(
    seed: int, dies_at: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fairness bound grows by dispatchers x allowance, however long it goes on."""
    gap, bound = gap_of(seed, dies_at, monkeypatch)
    assert abs(gap) <= bound


def test_without_ceilings_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    with planted(LeaseSplit, "_flow_shares", constant([])):
        gap, bound = gap_of(0, None, monkeypatch)
    assert abs(gap) > bound, "the test above could not fail"


@pytest.mark.parametrize("seed", range(2))
def test_a_dispatcher_that_hears_nothing_lets_nobody_limited_in(seed: int) -> None:
    """Its part is given away once its lease is over: it must know, cut off and not dead."""
    world = LeaseWorld(seed, {"few": (0, 1, 2)}, places=6)
    world.run(30)
    cut, now = world.fronts[2], 29 * 100_000_000
    later = now + leases_module.TTL_NS + 500_000_000
    assert not any(one.tenant == "few" for one in cut.heads(later))


def test_shares_follow_demand_and_sum_to_the_limit() -> None:
    split = LeaseSplit(TIERS, TENANTS)
    now, seen, leases = 0, {"d0": 0, "d1": 0}, []
    for _ in range(4):
        seen["d0"] += 90
        seen["d1"] += 10
        demands = [
            Demand(
                dispatcher_id=name,
                taken=now,
                lease=now - 1_000_000_000 if now else None,
                offered=(("slow", count),),
            )
            for name, count in seen.items()
        ]
        leases = split.split(demands, now)
        split.check()
        now += 1_000_000_000
    rates = [next(t for t in one.tenants if t.tenant == "slow") for one in leases]
    shares = [one.requests_per_minute or 0.0 for one in rates]
    assert sum(shares) == pytest.approx(120)
    assert shares[0] == pytest.approx(120 * 91 / 102, rel=0.01)
    assert [one.max_concurrent for one in rates] == [None, None]


def test_a_count_that_begins_anew_wants_what_it_says() -> None:
    """A dispatcher forgets a tenant that has been idle: its next count is a small one."""
    split = LeaseSplit(TIERS, TENANTS)
    for second, count in enumerate((2, 1, 1)):
        one, other = (
            Demand(dispatcher_id=name, taken=0, offered=(("slow", count),)) for name in ("d0", "d1")
        )
        leases = split.split([one, other], second * 6_000_000_000)
        split.check()
    rates = [next(t for t in one.tenants if t.tenant == "slow") for one in leases]
    assert [one.requests_per_minute for one in rates] == [60.0, 60.0]


def test_one_that_is_alone_has_no_ceiling() -> None:
    flow = Flow(tier="standard", tenant="light", queued=10, served=0.0)
    lease = LeaseSplit(TIERS, TENANTS).split(
        [Demand(dispatcher_id="d0", taken=0, flows=(flow,))], 0
    )[0]
    assert lease.flows == ()
    assert lease.share == 1.0
