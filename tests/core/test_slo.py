"""The ledger: its bounds, and what the state machine does not pin down."""

from __future__ import annotations

from dataclasses import replace

import pytest
from kit.ladder_machine import series
from kit.slo_machine import NS_PER_S, TIERS

from fabric.core.attainment import (
    Dimension,
    Outcome,
    Quantiles,
    Series,
    SloSnapshot,
    burn_by_part,
)
from fabric.core.control.slo import MAX_NAMES, OTHER, Ledger
from fabric.core.tiers import BUILT_IN


def served(tier: str = "fast", **fields: object) -> Outcome:
    fields = {"ttft_s": 0.1, "tpot_s": 0.01, "e2e_s": 1.0, "tokens": 10} | fields
    return Outcome(tier=tier, **fields)  # type: ignore[arg-type]


def test_names_are_bounded_and_the_rest_is_other() -> None:
    ledger = Ledger(TIERS, objective=0.99)
    for number in range(3 * MAX_NAMES):
        ledger.observe(served(tenant=f"t{number}", adapter=f"a{number}"), 0)
    ledger.check()
    page = ledger.page(0)
    tenants = [entry for entry in page if entry.dimension is Dimension.TENANT]
    assert len(tenants) == MAX_NAMES + 1
    assert next(e for e in tenants if e.name == OTHER).ten_minutes.requests == 2 * MAX_NAMES
    # Once the others are forgotten, there is room again.
    later = 700 * NS_PER_S
    ledger.observe(served(tenant="new"), later)
    assert [e.name for e in ledger.page(later) if e.dimension is Dimension.TENANT] == ["new"]
    ledger.check()


def test_a_tier_that_burns_its_budget_shows_it_at_once_and_then_forgets() -> None:
    ledger = Ledger(TIERS, objective=0.99)
    for second in range(300):
        ledger.observe(served(ttft_s=0.1 if second < 270 else 0.9), second * NS_PER_S)
    snapshot = ledger.snapshot([ledger.page(299 * NS_PER_S)], 299 * NS_PER_S)
    tier = snapshot.tier("fast")
    assert tier is not None
    assert tier.minute.burn_rate == pytest.approx(50, rel=0.1)
    assert tier.ten_minutes.burn_rate == pytest.approx(10, rel=0.01)
    assert snapshot.tier("slow") is None
    assert ledger.snapshot([ledger.page(1000 * NS_PER_S)], 0).series == ()


def test_misuse() -> None:
    with pytest.raises(ValueError, match="share"):
        Ledger(TIERS, objective=1.0)
    with pytest.raises(ValueError, match="no tier"):
        Ledger(TIERS, objective=0.9).observe(served("gold"), 0)


def test_missed_targets_are_whose_part_is_late() -> None:
    """By the 99th percentiles of a tier that burns; where neither is over, both parts."""
    tier = next(one for one in BUILT_IN if one.name == "standard")
    slow = Quantiles(count=50, p99=1.0 + max(tier.ttft_ms, tier.tpot_ms) / 1e3)
    burning = series("standard", 5.0)

    def parts(one: Series) -> tuple[float, float]:
        first, later = burn_by_part(SloSnapshot(taken=0, series=(one,)), BUILT_IN)
        return first[0], later[0]

    assert parts(replace(burning, ttft=slow)) == (5.0, 0.0)
    assert parts(replace(burning, tpot=slow)) == (0.0, 5.0)
    assert parts(replace(burning, ttft=slow, tpot=slow)) == parts(burning) == (5.0, 5.0)
    refused = replace(burning, minute=replace(burning.minute, refused=1))
    assert parts(refused) == (5.0, 0.0)
    assert parts(series("standard", 5.0, requests=1)) == (0.0, 0.0), "too few to say"
