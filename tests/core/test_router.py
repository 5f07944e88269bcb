"""What the router promises, one by one: spread, affinity that bends, bounds, comparisons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from fabric.core.configs import RouterConfig
from fabric.core.request import Request, SamplingParams
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic import prefix_index
from fabric.core.traffic.counter_random import CounterRandom
from fabric.core.traffic.policies import POLICIES
from fabric.core.traffic.prefix_index import PrefixIndex
from fabric.core.traffic.router import Choice, NoReplica, Router

MS = 1_000_000


def ask(number: int, prompt: Sequence[int], tier: str = "standard") -> Request:
    """A request for sixteen tokens."""
    sampling = SamplingParams(max_tokens=16)
    return Request(
        request_id=f"r{number}", prompt=tuple(prompt), sampling=sampling, arrival=0, tier=tier
    )


def idle(name: str, taken: int = 0) -> ReplicaSnapshot:
    """A replica without work: 10 ms a step, 1 ms a token."""
    return ReplicaSnapshot(
        replica_id=name, taken=taken, places=64, step_ns=10 * MS, token_ns=MS, row_ns=MS,
        blocks_total=1000, blocks_free=1000,
    )  # fmt: skip


def where(
    router: Router, requests: Sequence[Request], seen: Sequence[ReplicaSnapshot]
) -> list[str]:
    """Where each goes, with no news in between; "-": nowhere."""
    chosen = [router.choose(request, seen, 1) for request in requests]
    return [one.replica_id if isinstance(one, Choice) else "-" for one in chosen]


def test_a_burst_is_spread_before_any_new_snapshot() -> None:
    router = Router(RouterConfig(headroom_tokens=250))
    burst = [ask(i, range(i * 1000, i * 1000 + 100)) for i in range(7)]
    assert where(router, burst, [idle("a"), idle("b")]) == ["a", "b", "a", "b", "a", "b", "-"]
    assert router.choose(burst[0], [], 2) == NoReplica(busy=False)


def test_what_worse_tiers_wait_for_takes_no_head_room() -> None:
    router = Router(RouterConfig(headroom_tokens=250))
    full = replace(idle("a"), waiting_tokens=900, waiting_tokens_by_tier=(0, 0, 900))
    assert where(router, [ask(0, [1], "batch")], [full]) == ["-"]
    assert where(router, [ask(1, [1], "standard"), ask(2, [1], "interactive")], [full]) == [
        "a",
        "a",
    ]


def test_head_room_is_time_too() -> None:
    router = Router(RouterConfig(headroom_tokens=1000, headroom_ns=200 * MS))
    slow = replace(idle("a"), waiting_tokens=150, waiting_tokens_by_tier=(0, 150, 0))
    assert where(router, [ask(0, [1]), ask(1, [2])], [slow]) == ["a", "a"]
    slower = replace(slow, token_ns=2 * MS)
    assert where(router, [ask(2, [3])], [slower]) == ["-"]


def test_a_snapshot_ages() -> None:
    router = Router(RouterConfig(headroom_tokens=100))
    full = replace(idle("a"), waiting_tokens=120, waiting_tokens_by_tier=(0, 120, 0))
    assert router.choose(ask(0, [1]), [full], 0) == NoReplica(busy=True)
    assert isinstance(router.choose(ask(0, [1]), [full], 60 * MS), Choice)


def test_a_prefix_stays_where_it_is_held_until_waiting_costs_more() -> None:
    """400 shared tokens, 400 ms: worth waiting for, but not behind 500 ms of others' prompts."""
    router = Router(RouterConfig(headroom_tokens=2000, headroom_ns=2_000 * MS))
    shared = list(range(400))
    seen = [idle("a"), idle("b")]
    assert where(router, [ask(0, [*shared, 1])], seen) == ["a"]
    later = [idle("a", taken=100 * MS), idle("b", taken=100 * MS)]
    second = router.choose(ask(1, [*shared, 2]), later, 100 * MS)
    assert isinstance(second, Choice)
    assert (second.replica_id, second.cached_tokens) == ("a", 400)
    busy = replace(later[0], waiting_tokens=500, waiting_tokens_by_tier=(0, 500, 0))
    third = router.choose(ask(2, [*shared, 3]), [busy, later[1]], 100 * MS)
    assert isinstance(third, Choice) and third.replica_id == "b"
    fourth = router.choose(ask(3, [*shared, 4]), [busy, later[1]], 100 * MS)
    assert isinstance(fourth, Choice)
    assert (fourth.replica_id, fourth.cached_tokens) == ("b", 400), "now both hold it"


def test_a_popular_prefix_makes_no_hot_spot() -> None:
    router = Router(RouterConfig(headroom_tokens=100_000, headroom_ns=10**12))
    shared = list(range(64))
    seen = [idle(name) for name in "abcd"]
    burst = [ask(i, [*shared, *range(1000 * i, 1000 * i + 100)]) for i in range(1, 201)]
    counts = Counter(where(router, burst, seen))
    assert min(counts.values()) > 40 and len(counts) == 4


def test_an_adapter_runs_where_it_ran() -> None:
    router = Router(RouterConfig(headroom_tokens=1000))
    seen = [idle("a"), idle("b")]
    with_adapter = replace(ask(0, [1, 2]), adapter="lora")
    other = replace(ask(1, [7, 8]), adapter="other")
    assert where(router, [with_adapter, other], seen) == ["a", "b"]
    again = [replace(ask(2, [3]), adapter="other"), replace(ask(3, [4]), adapter="lora")]
    assert where(router, again, seen) == ["b", "a"]


def test_among_many_only_a_few_are_looked_at_and_the_holder_is_one_of_them() -> None:
    names = [f"r{number:03}" for number in range(200)]
    seen = [idle(name) for name in names]
    first, second = Router(RouterConfig(), seed=1), Router(RouterConfig(), seed=2)
    burst = [ask(i, [i]) for i in range(100)]
    chosen = where(first, burst, seen)
    assert chosen == where(Router(RouterConfig(), seed=1), burst, seen), "replays"
    assert chosen != where(second, burst, seen), "dispatchers draw for themselves"
    assert len(set(chosen)) > 60
    shared = list(range(5000, 5400))
    at = where(first, [ask(1000, shared)], seen)
    again = [ask(1001 + i, [*shared, i]) for i in range(3)]
    assert where(first, again, [idle(name, taken=100 * MS) for name in names]) == at * 3
    only = [replace(idle(n), waiting_tokens=9999) for n in names[:-1]] + [idle(names[-1])]
    assert where(first, [ask(2000, [9])], only) == [names[-1]], "the only one with head-room"


def test_policies_to_compare_with() -> None:
    seen = [replace(idle(name), running=count) for name, count in (("a", 9), ("b", 1), ("c", 5))]
    shared = list(range(100))
    burst = [ask(i, [*shared, i]) for i in range(12)]
    found = {}
    for policy in POLICIES:
        router = Router(RouterConfig(policy=policy, headroom_tokens=1), seed=3)
        found[policy] = where(router, burst, seen)
        router.check()
    assert found["round_robin"] == ["b", "c", "a"] * 4
    assert found["least_requests"][:6] == ["b", "b", "b", "b", "b", "c"]
    assert set(found["random"]) == {"a", "b", "c"}
    assert len(set(found["affinity"])) == 1
    with pytest.raises(ValueError, match="no policy 'best'"):
        Router(RouterConfig(policy="best"))


def test_the_index_is_bounded_and_forgets_a_chain_from_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefix_index, "MAX_BLOCKS", 6)
    index = PrefixIndex(4)
    old, new = ask(0, range(100)), ask(1, range(200, 300))
    assert len(index.digests(old)) == 6
    index.note("a", old, 10)
    index.note("a", new, 10)
    index.check()
    assert index.match(index.digests(new)) == {"a": 6}
    assert index.match(index.digests(old)) == {"a": 4}
    index.note("b", old, 0)
    assert index.match(index.digests(old)) == {"a": 4, "b": 6}
    index.forget("a")
    index.check()
    assert index.match(index.digests(old)) == {"b": 6} and index.replicas() == ["b"]
    assert index.match(index.digests(replace(old, request_id="x", tenant="other"))) == {}
    with pytest.raises(ValueError, match="at least one token"):
        PrefixIndex(0)


def test_samples_are_distinct_and_even() -> None:
    random = CounterRandom(5)
    counts: Counter[int] = Counter()
    for _ in range(2000):
        sample = random.sample(4, 10)
        assert len(set(sample)) == 4
        counts.update(sample)
    assert sorted(counts) == list(range(10))
    assert all(700 < count < 900 for count in counts.values())


def test_where_steps_are_bound_by_memory_a_queue_does_not_vanish_between_snapshots() -> None:
    """A token that costs nothing still waits for its step: 4 of 50 ms, of which half goes by."""
    router = Router(RouterConfig(headroom_tokens=512))
    bound = replace(idle("a"), running=8, waiting_tokens=1024, step_ns=50 * MS, token_ns=1)
    assert router.choose(ask(0, [1]), [bound], 100 * MS) == NoReplica(busy=True)
    assert isinstance(router.choose(ask(1, [1]), [bound], 300 * MS), Choice)


def full(name: str, ahead: int, taken: int = 0) -> ReplicaSnapshot:
    """So many prompt tokens wait there; eight sequences run."""
    by_tier = (0, ahead, 0)
    return replace(
        idle(name, taken), running=8, waiting_tokens=ahead, waiting_tokens_by_tier=by_tier
    )


def test_a_request_waits_for_the_holder_of_its_prefix_but_not_for_ever() -> None:
    """400 shared tokens beside 8 sequences are worth 3.6 s, more than the wait."""
    router = Router(RouterConfig(headroom_tokens=600, patience_ns=300 * MS))
    shared = list(range(400))
    assert where(router, [ask(0, [*shared, 1])], [full("a", 0)]) == ["a"]
    later = 10 * MS
    mine = ask(3, [*shared, 3])
    only = [full("a", 700, taken=later), full("z", 100, taken=later)]
    assert router.choose(mine, only, later) == NoReplica(busy=True, holder="a")
    assert router.still_waits("r3", later + 100 * MS)
    router.choose(ask(4, [7]), [full("a", 0, taken=later), only[1]], later + 100 * MS)
    assert not router.still_waits("r3", later + 100 * MS), "the holder has room"
    patient = router.choose(mine, only, later + 200 * MS)
    assert patient == NoReplica(busy=True, holder="a")
    impatient = router.choose(mine, only, later + 300 * MS)
    assert isinstance(impatient, Choice) and impatient.replica_id == "z"


def test_who_waits_for_a_holder_is_ahead_of_those_that_come_after_it() -> None:
    """Each one that waits makes the wait longer, until the next one goes elsewhere."""
    router = Router(RouterConfig(headroom_tokens=600))
    shared = list(range(400))
    assert where(router, [ask(0, [*shared, 1])], [full("a", 0)]) == ["a"]
    seen = [full("a", 700, taken=MS), full("z", 0, taken=MS)]
    own = [range(i * 1000, i * 1000 + 300) for i in range(1, 30)]
    burst = [ask(i, [*shared, *mine]) for i, mine in enumerate(own, 1)]
    outcomes = [router.choose(one, seen, MS) for one in burst]
    waiting = [isinstance(one, NoReplica) for one in outcomes]
    assert waiting[0] and not all(waiting)
    assert waiting.index(False) > 2, "several waited before one was sent elsewhere"
