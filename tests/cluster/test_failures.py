"""Engines that fail, hang or vanish, and dispatchers that do; in one process, without Ray."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest
from kit.local_replica import (
    LocalReplica,
    SlowWorker,
    alone,
    assert_idle,
    collect,
    engine_config,
    fleet,
    paced,
    request,
    settle,
    tokens_of,
)

import fabric.cluster.dispatcher as dispatcher_module
import fabric.cluster.engine_replica as replica_module
import fabric.cluster.replicas as replicas_module
from fabric.core.configs import EngineConfig
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.errors import Failed, Unavailable
from fabric.core.request import Finish, TokenChunk


async def test_a_failing_engine_costs_a_pause_and_turns_ready_red() -> None:
    async with fleet(step_s=0.002) as (front, calls):
        assert (await front.readiness()).ready
        one = request("q", max_tokens=60)
        task = asyncio.ensure_future(collect(front, one))
        await asyncio.sleep(0.05)
        calls.replicas["r0"].worker.fail = True
        while (await front.readiness()).ready:
            await asyncio.sleep(0.01)
            await front._refresh()
        assert "failed" in (await front.readiness()).reason
        while calls.replicas["r0"].service._rebuilds.total == 0:
            await asyncio.sleep(0.01)
        await asyncio.gather(calls.replicas["r0"].service._mending)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError, match="planted"):
            await calls.replicas["r0"].service.check_health()
        with pytest.raises(Unavailable):
            await collect(front, request("next"))
        assert not task.done(), "it waits for a replica"
        calls.kill("r0")
        calls.replicas["r1"] = LocalReplica("r1", engine_config(), paced(0.0005))
        assert [tokens_of(await task)] == alone(one)
        assert "fabric_requests_resumed_total 1.0" in await front.metrics_text()


async def test_an_engine_that_breaks_is_made_anew_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    async with fleet(replicas=0) as (front, calls):
        replica = LocalReplica("r0", engine_config(), paced(0.002), mends=True)
        calls.replicas["r0"] = replica
        while not front._replicas.live():
            await front._refresh()
        requests = [request(f"q{i}", max_tokens=150) for i in range(5)]
        tasks = [asyncio.ensure_future(collect(front, one)) for one in requests]
        for number in range(3):
            await asyncio.sleep(0.05)
            while front._quarantine._deaths or front._admission.queued_requests:
                await asyncio.sleep(0.01)
            replica.worker.fail = True
            while replica.service._rebuilds.total == number:
                await asyncio.sleep(0.01)
            await replica.service.check_health()
        for one, chunks in zip(requests, await asyncio.gather(*tasks), strict=True):
            assert [tokens_of(chunks)] == alone(one)
        text = await front.metrics_text()
        assert 'fabric_engine_rebuilds_total{model_name="scripted",replica="r0"} 3.0' in text
        replica.worker.fail = True
        last = asyncio.ensure_future(collect(front, request("last")))
        while replica.service.loop.error is None:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="planted"):  # enough: Serve shall replace it
            await replica.service.check_health()
        last.cancel()
        replica.service.loop.stop()


async def test_a_stuck_step_turns_ready_red_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "STUCK_S", 0.02)
    async with fleet() as (front, calls):
        replica = calls.replicas["r0"]
        replica.worker.hold = True
        task = asyncio.ensure_future(collect(front, request("q")))
        await asyncio.sleep(0.05)
        await front._refresh()
        readiness = await front.readiness()
        assert not readiness.ready
        assert "stuck" in readiness.reason
        replica.worker.hold = False
        assert tokens_of(await task)
        await front._refresh()
        assert (await front.readiness()).ready


async def test_a_dispatcher_that_vanishes_loses_its_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "LEASE_S", 0.2)
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.05)
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT_S", 0.05)
    async with fleet(step_s=0.005) as (front, calls):
        one = request("q", max_tokens=200)
        long = asyncio.ensure_future(collect(front, one))
        await asyncio.sleep(0.4)
        assert not long.done(), "heartbeats keep it"
        calls.cut = True
        calls.gone.add("r0")
        await settle(calls)
        assert_idle(calls)
        assert not long.done(), "it waits for the network"
        calls.cut = False
        calls.gone.clear()
        assert [tokens_of(await long)] == alone(one)


async def test_what_a_silent_replica_holds_goes_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "LEASE_S", 100)
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(replicas_module, "SILENT_S", 0.1)
    monkeypatch.setattr(replicas_module, "LOST_S", 0.3)
    async with fleet() as (front, calls):
        calls.replicas["r0"].worker.hold = True
        one = request("q")
        task = asyncio.ensure_future(collect(front, one))
        await asyncio.sleep(0.02)
        calls.cut = True
        await asyncio.sleep(0.15)
        with pytest.raises(Unavailable, match="no replica answers"):
            await collect(front, request("next"))
        await asyncio.sleep(0.3)
        assert not task.done()
        assert not front._replicas.links
        calls.replicas["r0"].worker.hold = False
        calls.cut = False
        assert [tokens_of(await task)] == alone(one)
        assert tokens_of(await collect(front, request("again")))


@pytest.mark.parametrize("seed", range(4))
async def test_whenever_replicas_die_nothing_is_lost_changed_or_doubled(seed: int) -> None:
    dice = random.Random(seed)
    requests = [
        request(
            f"q{i}",
            prompt=dice.randint(1, 60),
            max_tokens=dice.randint(1, 60),
            n=dice.choice((1, 1, 3)),
        )
        for i in range(40)
    ]
    small = {"num_blocks": 40, "num_host_blocks": 30}  # so that sequences are swapped as well
    async with fleet(replicas=2, engine=small) as (front, calls):
        tasks = [asyncio.ensure_future(collect(front, one)) for one in requests]
        for number in range(2):
            await asyncio.sleep(dice.random() * 0.2)
            dead = calls.kill(dice.choice(sorted(calls.replicas)))
            calls.replicas[f"r{number + 2}"] = LocalReplica(
                f"r{number + 2}", engine_config(**small), paced(0.0005)
            )
            dead.service.loop.stop()
        answers = await asyncio.gather(*tasks)
        for one, chunks in zip(requests, answers, strict=True):
            found = [tokens_of(chunks, choice) for choice in range(one.sampling.n)]
            assert found == alone(one)
        await settle(calls)
        assert_idle(calls)
        front._admission.check()
        front._quarantine.check()
        assert not front._quarantine._on and not front._quarantine._deaths
        assert front._admission.queued_requests == 0


async def test_a_choice_that_was_stopped_before_the_loss_stays_stopped() -> None:
    async with fleet(step_s=0.005) as (front, calls):
        one = request("q", max_tokens=60, n=2)
        chunks: list[TokenChunk] = []
        async with aclosing(front.stream(one)) as items:
            async for item in items:
                if not chunks:
                    front.abort_choice("q", 1)
                    calls.kill("r0")
                    calls.replicas["r1"] = LocalReplica("r1", engine_config(), paced(0.0005))
                chunks += item
        last = {chunk.choice: chunk for chunk in chunks}
        assert (last[0].finish, last[1].finish) == (Finish.LENGTH, Finish.ABORT)
        assert tokens_of(chunks, 0) == alone(one)[0]


class Deadly(SlowWorker):
    """It breaks in every step of a sequence that holds a certain token."""

    def __init__(self, config: EngineConfig, token: int) -> None:
        super().__init__(config, 0.0005)
        self._token = token
        self._deadly: set[int] = set()

    def execute(self, plan: StepPlan) -> StepResult:
        self._deadly |= {one.sequence for one in plan.starts if self._token in one.tokens}
        if self._deadly & {step.sequence for step in plan.steps}:
            raise RuntimeError("poison")
        return super().execute(plan)


async def test_a_request_that_kills_is_refused_after_two_and_nobody_else_is() -> None:
    poison = replace(request("poison", prompt=12), prompt=(77,) * 12)
    made = 0

    def new() -> LocalReplica:
        nonlocal made
        made += 1
        return LocalReplica(f"n{made}", engine_config(), worker=lambda c: Deadly(c, 77))

    async with fleet(replicas=0) as (front, calls):
        first = new()
        calls.replicas["n1"] = first
        while not front._replicas.live():
            await front._refresh()
        others = [request(f"q{i}", max_tokens=50) for i in range(12)]
        tasks = [asyncio.ensure_future(collect(front, one)) for one in others]
        await asyncio.sleep(0.03)
        deadly = asyncio.ensure_future(collect(front, poison))
        while not deadly.done():
            await asyncio.sleep(0.01)
            for name, one in list(calls.replicas.items()):
                if one.service.loop.error is not None:  # as Serve does it
                    calls.kill(name)
                    fresh = new()
                    calls.replicas[fresh.service.replica_id] = fresh
        with pytest.raises(Failed, match="Request poison can't be served"):
            await deadly
        assert made == 3, "two replicas died of it"
        for one, chunks in zip(others, await asyncio.gather(*tasks), strict=True):
            assert [tokens_of(chunks)] == alone(one)
        text = await front.metrics_text()
        assert "fabric_requests_poisonous_total 1.0" in text
        for one in calls.replicas.values():
            one.stop()
