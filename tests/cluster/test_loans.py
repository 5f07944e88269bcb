"""Replicas that lend each other prefixes: the right tokens whatever becomes of a loan, and nothing
left behind but what the shelf may keep."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from typing import Any

import pytest
from kit.local_pools import Siblings, counts, lenders
from kit.local_replica import (
    LocalCalls,
    alone,
    assert_idle,
    collect,
    request,
    settle,
    tokens_of,
)

from fabric.cluster import loans
from fabric.cluster.dispatcher import Dispatcher
from fabric.core.configs import FetchConfig
from fabric.core.request import Request
from fabric.core.traffic import router
from fabric.core.traffic.fetching import Price, find_fetch

PROMPT = 42  # ten blocks and a tail
RUNS = 3  # of 16 tokens, of its 40
# Of two replicas b gets the first request and a the second; of three, b, c and a.


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loans, "RUN_TOKENS", 16)


class Patience:
    """In place of what scripted workers compute in a millisecond: a busy machine is no harm."""

    seconds = 30.0

    def __call__(self, *arguments: Any, **named: Any) -> Price | None:
        price = find_fetch(*arguments, **named)
        if price is None:
            return None
        return replace(price, fetch=replace(price.fetch, patience_ns=round(self.seconds * 10**9)))


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Patience:
    found = Patience()
    monkeypatch.setattr(router, "find_fetch", found)
    return found


def alike(name: str, *, prompt: int = PROMPT, max_tokens: int = 6) -> Request:
    """All begin alike."""
    return replace(request("r", prompt, max_tokens=max_tokens), request_id=name)


async def check(front: Dispatcher, one: Request) -> None:
    assert tokens_of(await collect(front, one)) == alone(one)[0]


def computed(calls: LocalCalls) -> dict[str, int]:
    return {n: one.engine.snapshot(n, 0).prompt_tokens_total for n, one in calls.replicas.items()}


def failures(calls: LocalCalls) -> set[str]:
    names = [name for replica in calls.replicas for name in counts(calls, replica)]
    return {one.removeprefix("loan_failed_") for one in names if one.startswith("loan_failed_")}


def total(calls: LocalCalls, name: str) -> float:
    return sum(counts(calls, replica).get(name, 0) for replica in calls.replicas)


def forget(calls: LocalCalls, name: str) -> None:
    """It runs nothing, and other prompts take all of its blocks."""
    pool = calls.replicas[name].engine._scheduler.pool
    blocks = pool.allocate(pool.free)
    assert blocks is not None
    pool.release(blocks)


async def clean(calls: LocalCalls, siblings: Siblings) -> None:
    """Nothing is held but by the shelves."""
    await settle(calls)
    kept = 0
    for one in calls.replicas.values():
        porter, lent = one.service.porter, one.service.loans
        assert porter is not None and lent is not None
        async with asyncio.timeout(10.0):
            while porter.arrivals.waiting or lent._tasks or one.worker.inner.staging:
                await asyncio.sleep(0.005)
        lent.shelf.check()
        kept += len(lent.shelf._kept)
    gc.collect()  # tracebacks of what was hurt hold references in circles
    assert len(siblings.memory.objects) <= kept, "objects are left in the store"
    assert_idle(calls)


async def test_a_prefix_is_fetched_and_not_computed() -> None:
    async with lenders() as (front, calls, siblings):
        await check(front, alike("one"))
        await check(front, alike("two", prompt=PROMPT + 3))
        assert sorted(computed(calls).values()) == [5, PROMPT]
        assert total(calls, "loan_tokens") == total(calls, "lent_tokens") == 40
        assert siblings.lent == RUNS and not failures(calls)
        text = await front.metrics_text()
        assert 'what="loan_tokens"} 40' in text
        await clean(calls, siblings)


async def test_cached_tokens_are_told() -> None:
    async with lenders() as (front, calls, siblings):
        await check(front, alike("one"))
        chunks = await collect(front, alike("two"))
        assert chunks[0].cached_tokens == 40
        await clean(calls, siblings)


async def test_what_was_lent_outlives_the_pool_it_came_from() -> None:
    """It stays in the store: both pools forget it, and a third replica gets it all the same."""
    async with lenders(kinds="abc") as (front, calls, siblings):
        await check(front, alike("one"))
        await check(front, alike("two"))
        for name in "bc":
            forget(calls, name)
        await check(front, alike("three"))
        assert computed(calls) == {"b": PROMPT, "c": 2, "a": 2}
        assert counts(calls, "b")["lent_tokens"] == counts(calls, "b")["lent_tokens_kept"] == 40
        assert not failures(calls)
        await clean(calls, siblings)


async def test_what_the_shelf_has_no_room_for_comes_from_the_pool_again() -> None:
    """A run is 16 tokens of 16 bytes, the last one 8: the second one made room for the third."""
    async with lenders(kinds="abc", store_bytes=400) as (front, calls, siblings):
        for name in ("one", "two", "three"):
            await check(front, alike(name))
        assert computed(calls) == {"b": PROMPT, "c": 2, "a": 2}
        found = counts(calls, "b")
        assert found["lent_tokens"] + found.get("lent_tokens_kept", 0) == 80
        assert found["lent_tokens"] > 40, "more was kept than there is room for"
        await clean(calls, siblings)
        assert len(siblings.memory.objects) == 2


async def test_a_run_that_was_lost_is_not_offered_again() -> None:
    async with lenders(kinds="abc") as (front, calls, siblings):
        await check(front, alike("one"))
        siblings.harm, siblings.spared = "lose", 1
        await check(front, alike("two"))
        assert failures(calls) == {"lost"}
        siblings.harm = "none"
        await settle(calls)
        before = siblings.lent
        await check(front, alike("three"))
        assert siblings.lent == before + RUNS
        assert counts(calls, "a").get("loan_tokens") == 40, "what was lost is lent anew"
        assert total(calls, "lent_withdrawn") >= 1
        await clean(calls, siblings)


HARMS = {
    "corrupt": {"checksum"},
    "lose": {"lost"},
    "drop": {"missing"},
    "delay": {"timeout"},
    "break": {"unreachable"},
    "short": {"incomplete"},
    "again": {"incomplete"},
    "foreign": {"prefix"},
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("spared", [0, 1])
async def test_hurt_loans_cost_time_and_no_token(
    harm: str, spared: int, patience: Patience
) -> None:
    if HARMS[harm] == {"timeout"}:
        patience.seconds = 0.3
    async with lenders() as (front, calls, siblings):
        if harm == "foreign":
            for name in ("x", "y"):
                await check(front, replace(request("x", PROMPT), request_id=name))
        await check(front, alike("one"))
        before = siblings.lent
        if harm == "again":
            spared += 1
        siblings.harm, siblings.spared = harm, before + spared
        await check(front, alike("two", max_tokens=12))
        assert siblings.lent > before + spared, "nothing was hurt"
        await clean(calls, siblings)
        assert failures(calls) == HARMS[harm]
        assert min(computed(calls).values()) > 2, "what is missing is computed"
        siblings.harm = "none"
        await check(front, alike("three"))
        await clean(calls, siblings)


async def test_a_holder_that_forgot_it_lends_nothing() -> None:
    async with lenders(num_blocks=24) as (front, calls, siblings):
        await check(front, alike("one"))
        forget(calls, "b")
        await check(front, alike("two"))
        assert failures(calls) == {"missing"}
        await clean(calls, siblings)


async def test_a_client_that_leaves_leaves_nothing() -> None:
    async with lenders() as (front, calls, siblings):
        await check(front, alike("one"))
        siblings.harm = "delay"
        answer = asyncio.ensure_future(collect(front, alike("two")))
        async with asyncio.timeout(10.0):
            while not siblings.lent:
                await asyncio.sleep(0.001)
        answer.cancel()
        await asyncio.gather(answer, return_exceptions=True)
        await clean(calls, siblings)


async def test_what_does_not_pay_is_computed() -> None:
    slow = FetchConfig(latency_ns=10**12, min_tokens=8)
    async with lenders(fetch=slow) as (front, calls, siblings):
        await check(front, alike("one"))
        await check(front, alike("two"))
        assert list(computed(calls).values()) == [PROMPT, PROMPT]
        assert not siblings.lent
