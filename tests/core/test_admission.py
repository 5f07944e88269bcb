"""The queue's promises: fair shares, bounded waits, cheapest first, limits, deadlines."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.traffic_machines import NS_PER_S, request_of

from fabric.core.configs import AdmissionConfig
from fabric.core.degradation import Degradation
from fabric.core.request import Request
from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN, Tier
from fabric.core.traffic import service as service_module
from fabric.core.traffic.admission import Admission, Admitted, Shed, cost, work_tokens
from fabric.core.traffic.limits import Bucket
from fabric.core.traffic.lines import PRIORITIES
from fabric.core.traffic.room import Room
from fabric.core.traffic.speed import BacklogSpeed, Capacity

LARGEST = 40
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 5.0}
TENANTS = tuple(Tenant(name=name, weight=weight) for name, weight in WEIGHTS.items())
ONE_TIER = (Tier(name="standard", ttft_ms=1_000, tpot_ms=100),)


def ask(number: int, tokens: int = 10, now: int = 0, **fields: object) -> Request:
    return replace(request_of(number, tokens, now), **fields)  # type: ignore[arg-type]


def head(admission: Admission, now: int = 0) -> Request:
    return admission.heads(now)[0]


@given(st.lists(st.tuples(st.integers(1, LARGEST), st.integers(0, 4)), min_size=30, max_size=120))
@settings(max_examples=20)
def test_no_backlogged_tenant_falls_behind_its_weighted_share(
    work: list[tuple[int, int]],
) -> None:
    """Sheng et al. 2024: service over weight of any two stays within U/w + U'/w'. U: the largest
    charge, plus what running requests may still be corrected by."""
    admission = Admission(AdmissionConfig(tenants=TENANTS, tiers=ONE_TIER))
    number = 0
    served = dict.fromkeys(WEIGHTS, 0)
    for name in 2 * list(WEIGHTS):  # so that a line is never empty
        admission.offer(ask(number, work[0][0], tenant=name), 0)
        number += 1
    for size, output in work:
        took = admission.take(head(admission).request_id, 0)
        # One of the same tenant comes in its place: all stay backlogged.
        number += 1
        admission.offer(ask(number, size, tenant=took.tenant), 0)
        admission.completed(took, 0, tokens=output, finished=True)
        served[took.tenant] += cost(work_tokens(took), output)
        largest = LARGEST + 2 * 4
        for one, weight in WEIGHTS.items():
            for other, other_weight in WEIGHTS.items():
                gap = served[one] / weight - served[other] / other_weight
                assert abs(gap) <= largest / weight + largest / other_weight


def gap_when_passed(picks: list[tuple[int, int]]) -> float:
    """How far "a" and "b", both backlogged, get apart when the router passes over whom it likes;
    beside the bound of `fair`."""
    admission = Admission(AdmissionConfig(tenants=TENANTS, tiers=ONE_TIER))
    served = {"a": 0, "b": 0}
    number, worst = 0, 0.0
    for name in 3 * list(served):
        admission.offer(ask(number, LARGEST, tenant=name), 0)
        number += 1
    for pick, size in picks:
        able = list(admission.behind(head(admission), 0))
        took = admission.take(able[-1 if pick else 0].request_id, 0)
        number += 1
        admission.offer(ask(number, size, tenant=took.tenant), 0)
        admission.completed(took, 0, tokens=4, finished=True)
        served[took.tenant] += cost(work_tokens(took), 4)
        worst = max(worst, abs(served["a"] / WEIGHTS["a"] - served["b"] / WEIGHTS["b"]))
    largest = LARGEST + 2 * 4
    return worst - largest / WEIGHTS["a"] - largest / WEIGHTS["b"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, LARGEST)), min_size=60, max_size=90))
@settings(max_examples=12)
def test_who_is_passed_over_falls_behind_by_no_more_than_a_bound(
    picks: list[tuple[int, int]],
) -> None:
    """Requests that wait for a prefix's holder let others go before them, but not for ever: of any
    two tenants the gap is within `PASSED` of the bound above."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "PASSED", 100.0)
        assert gap_when_passed(picks) <= 100.0


def test_without_that_bound_it_falls_behind_for_good() -> None:
    assert gap_when_passed([(1, LARGEST)] * 60) > 400.0, "the test above could not fail"


@given(st.lists(st.tuples(st.sampled_from([0, 0, 0, 1]), st.integers(1, LARGEST)), min_size=60))
@settings(max_examples=14)
def test_no_tier_starves(arrivals: list[tuple[int, int]]) -> None:
    """However much of the first tiers comes, the last one, always backlogged, gets its seventh,
    up to the bound."""
    admission = Admission(AdmissionConfig(max_queued_requests=10_000))
    served = [0, 0, 0]
    waits = cycle([ask(number, 20, tier="batch") for number in range(40)])
    for _ in range(2):
        admission.offer(next(waits), 0)
    for number, (rank, tokens) in enumerate(arrivals, start=100):
        for extra in range(2):  # twice as much comes as goes
            tier = BUILT_IN[rank].name
            admission.offer(ask(2 * number + extra, tokens, tier=tier), 0)
        took = admission.take(head(admission).request_id, 0)
        charge = cost(work_tokens(took), 2)
        admission.completed(took, 0, tokens=2, finished=True)
        if took.tier == "batch":  # there is always some of it
            admission.offer(next(waits), 0)
        served[[tier.name for tier in BUILT_IN].index(took.tier)] += charge
    share = 1.0 / sum(tier.weight for tier in BUILT_IN)
    assert served[2] >= share * sum(served) - 3 * (LARGEST + 8)


def short_of_its_seventh(arrivals: list[tuple[int, int]]) -> float:
    """Where better tiers ask for twice what there is: the queue is always full, and batch finds
    head-room only where it is served as a better tier. It comes whenever a place is free."""
    admission = Admission(AdmissionConfig(max_queued_requests=16))
    served = [0.0, 0.0, 0.0]
    number = 0
    for first, tokens in arrivals:
        for rank in (2, first, 1 - first):
            number += 1
            admission.offer(ask(number, tokens, tier=BUILT_IN[rank].name), 0)
        roomy = [
            one
            for one in admission.heads(0)
            if one.tier != "batch" or admission.served_as(one) == "interactive"
        ]
        took = admission.take(roomy[0].request_id, 0)
        admission.check()
        admission.completed(took, 0, tokens=2, finished=True)
        served[admission.rank(took)] += cost(work_tokens(took), 2)
        assert took.served_as is None or took.tier != "interactive"
    share = 1.0 / sum(tier.weight for tier in BUILT_IN)
    return share * sum(served) - served[2]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, LARGEST)), min_size=150, max_size=150))
@settings(max_examples=8)
def test_no_tier_starves_behind_a_flood_of_better_ones(arrivals: list[tuple[int, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(service_module, "TIER_PASSED", 100.0)
        assert short_of_its_seventh(arrivals) <= 100.0 + 3 * (LARGEST + 8)


@pytest.mark.parametrize("name", ["TIER_PASSED", "part"])
def test_without_head_room_or_room_in_the_queue_it_starves(name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if name == "part":  # the whole queue goes to better tiers
            patch.setattr(Room, "_cheaper", lambda _, rank, lines: lines.below(rank))
        patch.setattr(service_module, "TIER_PASSED", 100.0 if name == "part" else 1e9)
        assert short_of_its_seventh([(number % 2, LARGEST) for number in range(150)]) > 500.0


@given(
    st.lists(st.tuples(st.integers(0, 1500), st.integers(-9, 9)), min_size=5, max_size=60),
    st.integers(-9, 9),
)
@settings(max_examples=30)
def test_a_request_is_overtaken_only_by_those_that_come_soon_after_it(
    flood: list[tuple[int, int]], priority: int
) -> None:
    """The proof in `lines`: (1 + 2 * PRIORITIES) TTFT targets after it, nobody does any more."""
    tier = ONE_TIER[0]
    horizon = (1 + 2 * PRIORITIES) * tier.ttft_ms * 1_000_000
    admission = Admission(AdmissionConfig(tiers=ONE_TIER, queue_ttl_s=1e6))
    admission.offer(ask(0, priority=priority), 0)
    now = 0
    for number, (later_ms, other) in enumerate(flood, start=1):
        now += later_ms * 1_000_000
        admission.offer(ask(number, now=now, priority=other), now)
    while (first := head(admission, now)).request_id != "r0":
        assert first.arrival <= horizon, "overtaken by one that came too late for it"
        admission.take(first.request_id, now)


def test_slack_decides_within_a_line() -> None:
    admission = Admission(AdmissionConfig())
    admission.capacity = Capacity(replicas=1, token_ns=1_000_000)
    for number, tokens, deadline_s in ((0, 10, None), (1, 900, None), (2, 10, 1), (3, 200, 1)):
        deadline = None if deadline_s is None else deadline_s * NS_PER_S
        admission.offer(ask(number, tokens, deadline=deadline), 0)
    order = []
    while admission.queued_requests:
        order.append(admission.take(head(admission).request_id, 0).request_id)
    assert order == ["r3", "r2", "r1", "r0"], "the long one must begin earlier"


def test_the_cheapest_goes_when_room_is_scarce() -> None:
    admission = Admission(AdmissionConfig(max_queued_requests=4))
    for number, tier in enumerate(("batch", "standard", "batch")):
        assert isinstance(admission.offer(ask(number, tier=tier), 0), Admitted)
    assert isinstance(admission.offer(ask(3, tier="batch"), 0), Shed), "a tenth is held back"
    assert admission.offer(ask(4, tier="interactive"), 0) == Admitted(ahead_tokens=0)
    displaced = admission.offer(ask(5, tier="interactive"), 0)
    assert isinstance(displaced, Admitted)
    assert [one.request_id for one in displaced.displaced] == ["r2"], "the newest of the cheapest"
    assert admission.queued_by_tier() == (2, 1, 1)
    displaced = admission.offer(ask(6, tier="interactive"), 0)
    assert isinstance(displaced, Admitted)
    assert [one.request_id for one in displaced.displaced] == ["r0"]
    assert isinstance(admission.offer(ask(7, tier="interactive"), 0), Shed), "2/7 are standard's"
    assert admission.queued_by_tier() == (3, 1, 0)
    admission.check()


def test_one_tenant_can_not_fill_the_queue() -> None:
    config = AdmissionConfig(max_queued_requests=10, tenant_share=0.5, tenants=TENANTS)
    admission = Admission(config)
    outcomes = [admission.offer(ask(number, tenant="a"), 0) for number in range(6)]
    assert [isinstance(one, Admitted) for one in outcomes] == [True] * 5 + [False]
    assert isinstance(admission.offer(ask(9, tenant="b"), 0), Admitted)


def test_who_can_not_make_its_deadline_is_told_at_once() -> None:
    admission = Admission(AdmissionConfig(tiers=ONE_TIER))
    soon = 2 * NS_PER_S
    for number in range(5):
        admission.offer(ask(number, 1000), 0)
    unmeasured = admission.offer(ask(10, 100, deadline=soon), 0)
    assert isinstance(unmeasured, Admitted), "nothing is known: nobody is refused for it"
    admission.cancel("r10", 0)
    # 500 tokens a second: what is ahead takes ten seconds.
    admission.capacity = Capacity(replicas=1, token_ns=2_000_000)
    # One with a deadline must start early, so it stands ahead of those without.
    first = admission.offer(ask(11, 100, deadline=soon), 0)
    assert first == Admitted(ahead_tokens=0)
    # The line moves slower than the replica says: 1,000 tokens in four seconds.
    admission.take("r11", 0)
    for number in range(2):
        now = (number + 1) * 2 * NS_PER_S
        admission.take(f"r{number}", now)
    now = 4 * NS_PER_S
    late = admission.offer(ask(12, 100, now=now, deadline=now + NS_PER_S // 10), now)
    assert isinstance(late, Shed)
    assert "deadline" in late.reason
    assert not late.own_limit
    assert late.retry_after_s >= 1.0


def test_an_answers_length_counts_for_its_deadline() -> None:
    admission = Admission(AdmissionConfig(tiers=ONE_TIER))
    admission.pace.add(0.1)
    for number in range(30):  # answers of 100 tokens: ten seconds
        long = replace(ask(number).sampling, max_tokens=200)
        admission.offer(ask(number, sampling=long), 0)
        admission.take(f"r{number}", 0)
        admission.completed(ask(number, sampling=long), 0, tokens=100, finished=True)
    five, twenty = 5 * NS_PER_S, 20 * NS_PER_S
    assert isinstance(admission.offer(ask(50, sampling=long, deadline=five), 0), Shed)
    assert isinstance(admission.offer(ask(51, sampling=long, deadline=twenty), 0), Admitted)


def test_a_tenants_own_limits_come_with_the_time_to_wait() -> None:
    tenant = Tenant(name="a", requests_per_minute=60, max_concurrent=2)
    admission = Admission(AdmissionConfig(tenants=(tenant,)))
    outcomes = [admission.offer(ask(number, tenant="a"), 0) for number in range(11)]
    shed = outcomes[-1]
    assert [isinstance(one, Admitted) for one in outcomes[:-1]] == [True] * 10
    assert isinstance(shed, Shed)
    assert (shed.own_limit, shed.retry_after_s) == (True, 1.0)
    assert isinstance(admission.offer(ask(20, tenant="a"), NS_PER_S), Admitted)
    for number in range(2):
        admission.take(f"r{number}", NS_PER_S)
    assert admission.heads(NS_PER_S) == [], "two run: the third waits"
    admission.offer(ask(30), NS_PER_S)
    assert [one.request_id for one in admission.heads(NS_PER_S)] == ["r30"]
    admission.take("r30", NS_PER_S)
    admission.completed(ask(0, tenant="a"), NS_PER_S, tokens=4, finished=True)
    assert [one.tenant for one in admission.heads(NS_PER_S)] == ["a"]
    admission.check()


def test_tokens_of_a_minute_are_corrected_by_what_was_used() -> None:
    tenant = Tenant(name="a", tokens_per_minute=600)  # 100 at once, 10 a second
    admission = Admission(AdmissionConfig(tenants=(tenant,)))
    many = replace(ask(0).sampling, max_tokens=100)
    assert isinstance(admission.offer(ask(0, 50, tenant="a", sampling=many), 0), Admitted)
    shed = admission.offer(ask(1, 40, tenant="a"), 0)
    assert isinstance(shed, Shed)
    assert shed.own_limit
    done = admission.take("r0", 0)
    admission.completed(done, 0, tokens=2, finished=True)  # 48 fewer than reckoned with
    assert isinstance(admission.offer(ask(2, 40, tenant="a"), 0), Admitted)


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 300)), min_size=1, max_size=60),
)
def test_a_bucket_never_gives_more_than_its_rate(
    per_minute: int, wants: list[tuple[int, int]]
) -> None:
    bucket = Bucket(per_minute, 0)
    now, taken = 0, list[tuple[int, int]]()
    for later_ms, want in wants:
        now += later_ms * 1_000_000
        wait_s = bucket.wait_s(want, now)
        if wait_s == 0:
            bucket.take(want, now)
            taken.append((now, want))
        elif wait_s < 3600:  # and the time it names is the right one
            then = now + int(wait_s * NS_PER_S) + 1_000_000
            assert bucket.wait_s(want, then) == 0
            now = then
    for index, (since, _) in enumerate(taken):
        inside = [want for _, want in taken[index:]]
        allowed = bucket.size + per_minute / 60 * (now - since) / NS_PER_S
        assert sum(inside) - max(inside) <= allowed + 1e-3, "the last may go into debt, no more"


def test_a_degraded_request_is_served_with_less() -> None:
    admission = Admission(AdmissionConfig())
    admission.degradation = Degradation(
        batch_max_tokens=8, cheaper_version="small", reroutes="standard", sheds=("batch",)
    )
    assert isinstance(admission.offer(ask(0, tier="batch"), 0), Shed)
    admission.degradation = replace(admission.degradation, sheds=())
    long = replace(ask(0).sampling, max_tokens=100)
    capped = admission.offer(ask(1, tier="batch", sampling=long), 0)
    assert isinstance(capped, Admitted)
    assert capped.degraded == "max_tokens"
    assert admission.take("r1", 0).sampling.max_tokens == 8
    moved = admission.offer(ask(2, sampling=long), 0)
    assert isinstance(moved, Admitted)
    assert moved.degraded == "version"
    took = admission.take("r2", 0)
    assert (took.model_version, took.sampling.max_tokens) == ("small", 100)
    untouched = admission.offer(ask(3, tier="interactive", sampling=long), 0)
    assert untouched == Admitted(ahead_tokens=0)


def test_the_speed_of_a_backlog_is_not_that_of_an_idle_server() -> None:
    speed = BacklogSpeed()
    assert speed.per_s(0) is None
    for second in range(10):  # one a second, and nobody ever waits: that says nothing
        speed.empty()
        assert speed.per_s(second * NS_PER_S) is None
    begin = 20 * NS_PER_S
    speed.waits(begin)
    for tenth in range(1, 51):
        speed.released(100, begin + tenth * NS_PER_S // 10)
    assert speed.per_s(begin + 5 * NS_PER_S) == pytest.approx(1000, rel=0.05)
    later = speed.per_s(begin + 15 * NS_PER_S)
    assert later is not None
    assert later < 500, "it stands still"
