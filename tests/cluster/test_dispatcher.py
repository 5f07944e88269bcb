"""Dispatcher, link, replica and engine loop together, in one process, without Ray."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from kit.local_replica import (
    LocalCalls,
    LocalReplica,
    alone,
    assert_idle,
    collect,
    dispatcher,
    engine_config,
    fleet,
    request,
    settle,
    tokens_of,
)
from prometheus_client.parser import text_string_to_metric_families

import fabric.cluster.engine_replica as replica_module
from fabric.cluster.dispatcher import Dispatcher
from fabric.core.errors import Overloaded, RequestError, Unavailable
from fabric.core.request import Finish, Request, TokenChunk


async def test_many_requests_over_two_replicas_get_the_tokens_they_get_alone() -> None:
    requests = [
        request(f"q{i}", prompt=3 + 7 * i % 40, max_tokens=1 + 5 * i % 23, n=1 + i % 3)
        for i in range(40)
    ]
    async with fleet(replicas=2) as (front, calls):
        answers = await asyncio.gather(*(collect(front, one) for one in requests))
        for one, chunks in zip(requests, answers, strict=True):
            choices = [tokens_of(chunks, choice) for choice in range(one.sampling.n)]
            assert choices == alone(one)
        served = [one.service.loop.snapshot.finished_total for one in calls.replicas.values()]
        assert min(served) > 0, "both replicas took part"
        await settle(calls)
        assert_idle(calls)
        assert front.drain() == 0


PHASES = {"queued", "waiting", "prefill", "decode", "swapped", "finished"}


async def test_storms_of_cancellations_leave_every_gauge_at_zero() -> None:
    """Whenever the client leaves, everything is freed. Storms go on until each phase was met."""
    met: set[str] = set()
    for seed in range(20):
        met |= await storm(random.Random(seed))
        if seed >= 2 and met >= PHASES:
            return
    raise AssertionError(f"never met: {PHASES - met}")


async def storm(dice: random.Random) -> set[str]:
    """200 requests, each cancelled at some time. The phases in which they were met."""
    requests = [
        request(
            f"q{i}",
            prompt=dice.randint(1, 60),
            max_tokens=dice.randint(1, 60),
            n=dice.choice((1, 1, 2)),
            priority=dice.choice((0, 0, 1, -1)),
        )
        for i in range(200)
    ]
    met: set[str] = set()

    async def leave_early(front: Dispatcher, calls: LocalCalls, one: Request) -> None:
        await asyncio.sleep(dice.random() * 0.3)
        task = asyncio.ensure_future(collect(front, one))
        await asyncio.sleep(dice.random() ** 2 * 0.25)
        met.add(phase_of(front, calls, one, task))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    # A pool so small that sequences are preempted.
    async with fleet(engine={"num_blocks": 40, "num_host_blocks": 30}) as (front, calls):
        await asyncio.gather(*(leave_early(front, calls, one) for one in requests))
        await settle(calls)
        await asyncio.sleep(0.01)
        assert_idle(calls)
        assert front.drain() == 0
        for one in calls.replicas.values():
            assert not one.service._owner
            assert not any(box.opened for box in one.service._boxes.values())
        assert not any(link.opened for link in front._replicas.links.values())
        # After all that it still works.
        front._draining = False
        last = request("last")
        assert [tokens_of(await collect(front, last))] == alone(last)
    return met


def phase_of(front: Dispatcher, calls: LocalCalls, one: Request, task: asyncio.Future[Any]) -> str:
    """Where a request is right now; the engine's thread goes on meanwhile, so it is a guess."""
    if task.done():
        return "finished"
    if one.request_id in front._turns:
        return "queued"
    group = calls.replicas["r0"].engine._groups.get(one.request_id)
    sequence = group and next(iter(group.live.values()), None)
    if sequence is None:
        return "on its way"
    if sequence.host_blocks:
        return "swapped"
    if not sequence.blocks:
        return "waiting"
    return "prefill" if sequence.computed < sequence.prompt_length else "decode"


async def test_requests_beyond_the_queue_are_turned_away_with_a_time() -> None:
    async with fleet(step_s=0.002, max_queued_requests=2) as (front, calls):
        some = [asyncio.ensure_future(collect(front, request(f"q{i}", 60))) for i in range(12)]
        results = await asyncio.gather(*some, return_exceptions=True)
        shed = [one for one in results if isinstance(one, Overloaded)]
        assert shed
        assert all(one.retry_after_s >= 1 for one in shed)
        assert any(isinstance(one, list) for one in results)
        record: Any = await front.fleet_status()
        assert record["ingresses"][0]["shed_total"] == len(shed)


async def test_a_request_that_waits_too_long_is_turned_away() -> None:
    async with fleet(queue_ttl_s=0.05) as (front, calls):
        replica = calls.replicas["r0"]
        replica.worker.hold = True
        ahead = [asyncio.ensure_future(collect(front, request(f"a{i}", 60))) for i in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded, match="waited too long"):
            await collect(front, request("late", 60))
        replica.worker.hold = False
        await asyncio.gather(*ahead, return_exceptions=True)


async def test_a_client_that_leaves_as_its_wait_ends_harms_nobody() -> None:
    async with fleet(queue_ttl_s=0.05) as (front, calls):
        replica = calls.replicas["r0"]
        replica.worker.hold = True
        ahead = [asyncio.ensure_future(collect(front, request(f"a{i}", 60))) for i in range(3)]
        await asyncio.sleep(0.02)
        late = asyncio.ensure_future(collect(front, request("late", 60)))
        await asyncio.sleep(0.1)
        late.cancel()  # its turn is cancelled now, and taken out of the queue a moment later
        front._release()
        replica.worker.hold = False
        await asyncio.gather(late, *ahead, return_exceptions=True)
        assert late.cancelled()
        assert tokens_of(await collect(front, request("next")))


async def test_a_stop_string_ends_a_request_as_a_success() -> None:
    """The gateway asks for the end of every choice and closes the stream at once."""
    async with fleet(step_s=0.002) as (front, calls):
        async with aclosing(front.stream(request("q", max_tokens=60, n=2))) as items:
            async for _ in items:
                front.abort_choice("q", 0)
                front.abort_choice("q", 1)
                break
        await settle(calls)
        service = calls.replicas["r0"].service
        while service._owner:
            await asyncio.sleep(0.002)
        assert service.measures.finished == {"stop": 2}
        assert sum(service.measures.histograms["e2e_request_latency_seconds"].counts) == 1
        assert_idle(calls)


async def test_heartbeats_asked_for_at_once_are_one() -> None:
    async with fleet() as (front, calls):
        beats = 0
        original = calls.heartbeat

        async def slow(report: bytes, timeout_s: float) -> list[bytes]:
            nonlocal beats
            beats += 1
            await asyncio.sleep(0.05)
            return await original(report, timeout_s)

        calls.heartbeat = slow  # type: ignore[method-assign]
        await asyncio.gather(*(front.metrics_text() for _ in range(20)))
        assert beats <= 2, "the one in hand, and perhaps the next second's"


async def test_a_request_too_large_for_the_pool_is_refused_in_words() -> None:
    async with fleet(engine={"num_blocks": 4}) as (front, _):
        with pytest.raises(RequestError, match="KV blocks"):
            await collect(front, request("big", prompt=30, max_tokens=30))


async def test_one_choice_can_be_ended() -> None:
    async with fleet(step_s=0.002) as (front, calls):
        one = request("q", max_tokens=60, n=2)
        chunks: list[TokenChunk] = []
        async with aclosing(front.stream(one)) as items:
            async for item in items:
                if not chunks:
                    front.abort_choice("q", 1)
                chunks += item
        last = {chunk.choice: chunk for chunk in chunks}
        assert last[1].finish is Finish.ABORT
        assert last[0].finish is Finish.LENGTH
        assert len(tokens_of(chunks, 0)) == 60


async def test_a_stream_is_closed_when_idle_and_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "STREAM_IDLE_S", 0.05)
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.01)
    opened = ended = 0
    original = LocalCalls.steps

    async def counted(self: LocalCalls, replica_id: str) -> AsyncIterator[bytes]:
        nonlocal opened, ended
        opened += 1
        async for item in original(self, replica_id):
            yield item
        ended += 1

    monkeypatch.setattr(LocalCalls, "steps", counted)
    async with fleet() as (front, calls):
        for number in range(3):
            one = request(f"q{number}")
            assert [tokens_of(await collect(front, one))] == alone(one)
            while ended < number + 1:
                await asyncio.sleep(0.01)
            assert opened == ended


async def test_a_request_that_meets_a_closing_stream_loses_nothing() -> None:
    async with fleet() as (front, calls):
        for number in range(30):
            one = request(f"q{number}")
            box = calls.replicas["r0"].service._box("d0")
            box.hang_up()
            if number % 3:
                await asyncio.sleep(0)
            assert [tokens_of(await collect(front, one))] == alone(one)


async def test_draining_refuses_new_requests_and_finishes_old_ones() -> None:
    async with fleet(step_s=0.002) as (front, _):
        one = request("q", max_tokens=30)
        task = asyncio.ensure_future(collect(front, one))
        await asyncio.sleep(0.01)
        assert front.drain() == 1
        with pytest.raises(Unavailable, match="shutting down"):
            await collect(front, request("next"))
        assert [tokens_of(await task)] == alone(one)
        assert front.drain() == 0


async def test_a_reader_that_stands_still_holds_up_nobody() -> None:
    async with fleet() as (front, _):
        slow = front.stream(request("slow", max_tokens=40))
        await anext(slow)
        others = [request(f"q{i}", max_tokens=40) for i in range(6)]
        answers = await asyncio.gather(*(collect(front, one) for one in others))
        assert [[tokens_of(answer)] for answer in answers] == [alone(one) for one in others]
        rest = [chunk async for item in slow for chunk in item]
        assert rest[-1].finish is Finish.LENGTH


# What dashboards and endpoint pickers read of vLLM's names, and how.
VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "num_preemptions": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
}


async def test_metrics_have_the_names_that_dashboards_read() -> None:
    async with fleet(replicas=2) as (front, _):
        await collect(front, request("q"))
        await front._refresh()
        text = await front.metrics_text()
    found = {one.name: one for one in text_string_to_metric_families(text)}
    assert {name: found[f"vllm:{name}"].type for name in VLLM} == VLLM
    for name in VLLM:
        of_replicas = {
            sample.labels["replica"]
            for sample in found[f"vllm:{name}"].samples
            if not sample.labels["replica"].startswith("ingress:")
        }
        assert of_replicas == {"r0", "r1"} or name == "request_success"
        assert all(s.labels["model_name"] == "scripted" for s in found[f"vllm:{name}"].samples)
    bucket = [s for s in found["vllm:e2e_request_latency_seconds"].samples if "le" in s.labels]
    assert bucket[-1].labels["le"] == "+Inf"


async def test_every_ingress_shows_the_whole_fleet() -> None:
    local = [LocalReplica(f"r{number}", engine_config()) for number in range(2)]
    first = await dispatcher(LocalCalls("d0", *local))
    second = await dispatcher(LocalCalls("d1", *local))
    try:
        await asyncio.gather(*(collect(first, request(f"a{i}", max_tokens=4)) for i in range(6)))
        await asyncio.gather(*(collect(second, request(f"b{i}", max_tokens=4)) for i in range(6)))
        second.counters.unknown_fields(["spoon"])
        await second._refresh()
        text = await first.metrics_text()
        tokens = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("vllm:generation_tokens_total{")
        ]
        assert len(tokens) == 2
        assert sum(tokens) == 12 * 4
        assert "fabric_ingresses 2.0" in text
        assert "fabric_requests_admitted_total 12.0" in text
        assert 'fabric_unknown_fields_total{field="spoon"} 1' in text
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
        ):
            counts = [
                float(line.rsplit(" ", 1)[1])
                for line in text.splitlines()
                if line.startswith(f"vllm:{name}_count")
            ]
            assert sum(counts) == 12, name
        gaps = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("vllm:inter_token_latency_seconds_count")
        ]
        assert sum(gaps) == 12 * 3
    finally:
        for one in local:
            one.stop()
