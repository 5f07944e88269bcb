"""Engines that fail, hang or vanish, and dispatchers that do; in one process, without Ray."""

from __future__ import annotations

import asyncio

import pytest
from kit.local_replica import assert_idle, collect, fleet, request, settle, tokens_of

import fabric.cluster.dispatcher as dispatcher_module
import fabric.cluster.engine_replica as replica_module
from fabric.core.errors import Unavailable
from fabric.core.request import Finish


async def test_a_failing_engine_fails_its_requests_and_turns_ready_red() -> None:
    async with fleet(step_s=0.002) as (front, calls):
        assert (await front.readiness()).ready
        task = asyncio.ensure_future(collect(front, request("q", max_tokens=60)))
        await asyncio.sleep(0.02)
        calls.replicas["r0"].worker.fail = True
        chunks = await task
        assert chunks[-1].finish is Finish.ERROR
        await front._refresh()
        readiness = await front.readiness()
        assert not readiness.ready
        assert "failed" in readiness.reason
        with pytest.raises(RuntimeError, match="planted"):
            await calls.replicas["r0"].service.check_health()
        with pytest.raises(Unavailable):
            await collect(front, request("next"))


async def test_a_stuck_step_turns_ready_red_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module, "STEP_DEADLINE_S", 0.02)
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
        long = asyncio.ensure_future(collect(front, request("q", max_tokens=200)))
        await asyncio.sleep(0.4)
        assert not long.done(), "heartbeats keep it"
        calls.cut = True
        with pytest.raises(Unavailable):
            await long
        await settle(calls)
        assert_idle(calls)


async def test_a_silent_replica_gets_no_requests_and_a_lost_one_fails_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "LEASE_S", 100)
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(dispatcher_module, "SILENT_S", 0.1)
    monkeypatch.setattr(dispatcher_module, "LOST_S", 0.3)
    async with fleet() as (front, calls):
        calls.replicas["r0"].worker.hold = True
        task = asyncio.ensure_future(collect(front, request("q")))
        await asyncio.sleep(0.02)
        calls.cut = True
        await asyncio.sleep(0.15)
        with pytest.raises(Unavailable, match="no replica answers"):
            await collect(front, request("next"))
        assert not task.done()
        with pytest.raises(Unavailable, match="gone"):
            await task
        calls.replicas["r0"].worker.hold = False
        calls.cut = False
        while not (await front.readiness()).ready:
            await asyncio.sleep(0.01)
        assert tokens_of(await collect(front, request("again")))
