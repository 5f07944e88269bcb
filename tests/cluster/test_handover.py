"""Prompts in one replica, outputs in another: the right tokens whatever becomes of the KV between
them, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing

import pytest
from kit.local_pools import Wire, counts, fallbacks, pools
from kit.local_replica import (
    LocalCalls,
    LocalReplica,
    alone,
    assert_idle,
    collect,
    request,
    settle,
    tokens_of,
)

from fabric.cluster import link, porter
from fabric.cluster.detour import Detours
from fabric.cluster.dispatcher import Dispatcher
from fabric.cluster.engine_loop import Command
from fabric.cluster.wire import encode_request
from fabric.core.request import Request
from fabric.core.traffic.journey import Journey

PROMPT = 42  # ten blocks and a tail
Fixture = tuple[Dispatcher, LocalCalls, Wire]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(porter, "WAIT_S", 0.3)
    monkeypatch.setattr(porter, "LAND_TIMEOUT_S", 5.0)
    yield


async def clean(calls: LocalCalls, wire: Wire) -> None:
    """Everything is as it was before the first request."""
    await settle(calls)
    for _ in range(30):
        gc.collect()  # tracebacks of what was hurt hold references in circles
        if not wire.memory.objects and not any(
            one.engine.has_work or one.worker.inner.staging or holds_blocks(one)
            for one in calls.replicas.values()
        ):
            break
        await asyncio.sleep(0.05)
    assert not wire.memory.objects, "objects are left in the store"
    for one in calls.replicas.values():
        assert not one.worker.inner.staging, "slots are left"
    assert_idle(calls)


def holds_blocks(one: LocalReplica) -> bool:
    snapshot = one.engine.snapshot("", 0)
    return snapshot.blocks_free < snapshot.blocks_total


async def check(front: Dispatcher, one: Request) -> None:
    assert tokens_of(await collect(front, one)) == alone(one)[0]


async def test_one_request_goes_over_both() -> None:
    async with pools() as (front, calls, wire):
        await check(front, request("r", PROMPT, max_tokens=12))
        assert wire.carried > 1, "it travels while it is computed"
        snapshots = {n: one.engine.snapshot(n, 0) for n, one in calls.replicas.items()}
        assert snapshots["p"].prompt_tokens_total == PROMPT
        assert snapshots["p"].generated_tokens_total == 1
        assert snapshots["d"].prompt_tokens_total == 0, "nothing is computed twice"
        assert snapshots["d"].generated_tokens_total == 11
        assert fallbacks(calls) == {}
        assert counts(calls)["runs_landed"] == wire.carried == counts(calls, "p")["groups_sent"]
        await clean(calls, wire)


async def test_many_at_once() -> None:
    async with pools(num_blocks=400) as (front, calls, wire):
        asks = [request(f"r{n}", 20 + 3 * n, max_tokens=4 + n) for n in range(12)]
        await asyncio.gather(*(check(front, one) for one in asks))
        await clean(calls, wire)


async def test_a_short_prompt_stays_in_one_place() -> None:
    async with pools() as (front, calls, wire):
        await check(front, request("r", 9))
        await check(front, request("n", PROMPT, n=2, max_tokens=3))
        assert not wire.carried
        await clean(calls, wire)


async def test_a_prefix_that_is_there_stays_there() -> None:
    async with pools() as (front, calls, wire):
        first = request("r", PROMPT)
        await check(front, first)
        carried = wire.carried
        await check(front, request("r", PROMPT + 5))  # the same beginning
        assert wire.carried == carried
        await clean(calls, wire)


HARMS = {
    "corrupt": {"checksum"},
    "lose": {"lost"},
    "drop": {"timeout"},
    "delay": {"timeout"},
    "break": {"timeout"},
    "fail": {"unsent"},
    "twice": set(),
}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("spared", [0, 1])
async def test_hurt_groups_cost_time_and_no_token(
    harm: str, spared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "timeout" not in HARMS[harm]:  # nothing is to be waited for: a busy machine is no harm
        monkeypatch.setattr(porter, "WAIT_S", 30.0)
        monkeypatch.setattr(porter, "LAND_TIMEOUT_S", 60.0)
    async with pools() as (front, calls, wire):
        wire.harm, wire.spared = harm, spared
        await check(front, request("r", PROMPT, max_tokens=12))
        assert wire.carried > spared, "nothing was hurt"
        assert set(fallbacks(calls)) == HARMS[harm]
        computed = calls.replicas["d"].engine.snapshot("d", 0).prompt_tokens_total
        assert (computed > 0) == bool(HARMS[harm]), "what is missing is computed again"
        wire.harm = "none"
        await check(front, request("after", PROMPT, max_tokens=5))
        await asyncio.sleep(0.0)
        await clean(calls, wire)


async def test_metrics_count_what_was_handed_over() -> None:
    async with pools() as (front, _calls, _wire):
        await check(front, request("r", PROMPT, max_tokens=12))
        lines = (await front.metrics_text()).splitlines()
        assert "fabric_handover_sampled_total 1" in lines
        assert "fabric_handover_gaps_total 1" in lines


async def test_groups_of_two_requests_are_exchanged() -> None:
    async with pools() as (front, calls, wire):
        wire.harm = "swap"
        asks = [request(name, PROMPT, max_tokens=10) for name in ("one", "two", "three", "four")]
        await asyncio.gather(*(check(front, one) for one in asks))
        found = counts(calls)
        assert found.get("groups_late", 0) + sum(fallbacks(calls).values()) > 0
        await clean(calls, wire)


@pytest.mark.parametrize("when", ["prefill", "decode"])
async def test_a_client_that_leaves_frees_both(when: str) -> None:
    async with pools(step_s=0.01) as (front, calls, wire):
        one = request("r", PROMPT, max_tokens=60)
        items = front.stream(one)
        if when == "decode":
            async with aclosing(items) as chunks:  # type: ignore[type-var]
                seen = 0
                async for found in chunks:
                    seen += sum(len(chunk.tokens) for chunk in found)
                    if seen > 3:
                        break
        else:
            await leave(items, 0.03)
        await clean(calls, wire)


async def leave(items: AsyncIterator[object], after_s: float) -> None:
    async def read() -> None:
        async for _ in items:
            pass

    task = asyncio.get_running_loop().create_task(read())
    await asyncio.sleep(after_s)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_who_is_done_with_the_first_token_leaves_nothing_reserved() -> None:
    async with pools() as (front, calls, wire):
        one = Journey(request("r", PROMPT, max_tokens=12))
        gave_up = asyncio.Event()
        give_up = calls.give_up

        async def heard(replica_id: str, request_id: str, reason: str) -> None:
            await give_up(replica_id, request_id, reason)
            gave_up.set()

        calls.give_up = heard  # type: ignore[method-assign]
        links = front._replicas.links
        async with aclosing(Detours().run(one, links["p"], links["d"])) as items:
            async for chunks in items:
                one.note(chunks)
                one.stop(0)  # its text is complete: no decode leg will come
        await asyncio.wait_for(gave_up.wait(), 10.0)
        await clean(calls, wire)


async def test_a_refused_leg_sends_nothing() -> None:
    async with pools() as (_front, calls, _wire):
        prefill = calls.replicas["p"].service
        with pytest.raises(ValueError):
            await prefill.generate(encode_request(request("r", 10_000)), "d0", "d", 1)
        assert prefill.porter is not None
        assert not prefill.porter._outgoing


async def test_an_engine_that_has_ended_reserves_nothing() -> None:
    async with pools() as (_front, calls, _wire):
        decode = calls.replicas["d"].service
        decode.loop.error = "it broke"
        with pytest.raises(ConnectionRefusedError):
            await decode.reserve(encode_request(request("r", PROMPT)), "d0", 1)
        assert decode.porter is not None
        assert not decode.porter.arrivals.waiting
        decode.loop.error = None


async def test_who_leaves_while_the_engine_is_asked_leaves_nothing_reserved() -> None:
    async with pools() as (_front, calls, wire):
        decode = calls.replicas["d"].service
        submit = decode.loop.submit
        late: list[Command] = []
        decode.loop.submit = late.append  # type: ignore[method-assign]
        asking = asyncio.ensure_future(
            decode.reserve(encode_request(request("r", PROMPT)), "d0", 1)
        )
        while not late:
            await asyncio.sleep(0)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.sleep(0)
        decode.loop.submit = submit  # type: ignore[method-assign]
        for command in late:
            submit(command)
        await clean(calls, wire)


async def test_the_porter_of_an_engine_that_has_ended_does_nothing_more() -> None:
    async with pools() as (_front, calls, _wire):
        decode = calls.replicas["d"].service
        old = decode.porter
        assert old is not None
        assert await decode.reserve(encode_request(request("r", PROMPT)), "d0", 1)
        timer = old.arrivals.waiting["r"].timer
        decode.loop.stop()
        decode.loop = decode._start_loop()
        assert timer.cancelled() and decode.porter is not old
        await decode._ask(lambda engine: engine.give_up("r"))


async def test_misuse_is_told_to_who_asked() -> None:
    async with pools() as (front, calls, wire):
        decode = calls.replicas["d"].service
        with pytest.raises(ValueError, match="no such request"):
            await decode._ask(lambda engine: engine.export("nobody", 1))
        await check(front, request("r", PROMPT, max_tokens=5))
        await clean(calls, wire)


async def test_no_room_at_the_decode_replica() -> None:
    async with pools(num_blocks=16) as (front, calls, wire):
        await check(front, request("r", PROMPT, max_tokens=8))
        assert set(fallbacks(calls)) == {"no_room"}
        assert "fabric_handover_refused_total 1" in (await front.metrics_text()).splitlines()
        await clean(calls, wire)


async def test_a_death_is_booked_on_who_was_there() -> None:
    """First at the replica of its prompt, then, with the first token, at the other one."""
    async with pools() as (front, calls, wire):
        prefill, decode = calls.replicas["p"].worker, calls.replicas["d"].worker
        prefill.hold = decode.hold = True
        one = request("r", PROMPT, max_tokens=12)
        answer = asyncio.ensure_future(collect(front, one))
        async with asyncio.timeout(30):
            while front._quarantine._on != {"r": "p"}:
                await asyncio.sleep(0.001)
            prefill.hold = False
            while front._quarantine._on != {"r": "d"}:
                await asyncio.sleep(0.001)
        decode.hold = False
        assert tokens_of(await answer) == alone(one)[0]
        await clean(calls, wire)


async def test_a_replica_that_was_forgotten_and_heard_of_again_between_the_legs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a machine that stood still for a while: its heartbeats were late, it lives."""
    monkeypatch.setattr(link, "LAST_WORD_S", 60.0)  # no second way out
    async with pools() as (front, calls, wire):
        prefill = calls.replicas["p"].worker
        prefill.hold = True
        one = request("r", PROMPT, max_tokens=12)
        answer = asyncio.ensure_future(collect(front, one))
        links = front._replicas.links
        async with asyncio.timeout(30):
            while front._quarantine._on != {"r": "p"}:
                await asyncio.sleep(0.001)
            links.pop("d").close()
            await front._refresh()
            assert "d" in links
            prefill.hold = False
            assert tokens_of(await answer) == alone(one)[0]
        await clean(calls, wire)
