"""What scaling asks of a dispatcher and a replica; in one process, without Ray."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from kit.local_replica import (
    LocalCalls,
    LocalReplica,
    assert_idle,
    collect,
    dispatcher,
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
from fabric.cluster.fleet import fleet_text
from fabric.cluster.local_stream import connect
from fabric.cluster.reports import DispatcherReport
from fabric.cluster.scaling import BURN, MIXED, NUMBERS, QUEUE, ScalingPolicy, pool_of
from fabric.cluster.status import _scaling
from fabric.cluster.wire import encode_request
from fabric.core.configs import AutoscalerConfig
from fabric.core.errors import Unavailable
from fabric.core.tiers import Tier


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "HEARTBEAT_S", 0.02)


@pytest.mark.usefixtures("quick")
async def test_requests_are_held_at_zero_and_one_call_knocks_for_all() -> None:
    async with fleet() as (front, calls):
        calls.cold_starts = True
        calls.gone.add("r0")
        assert (await front.readiness()).ready, "at zero it is ready to take requests"
        assert front.model().context_limit == 256
        tasks = [asyncio.ensure_future(collect(front, request(f"q{i}"))) for i in range(5)]
        await asyncio.sleep(0.1)
        assert not any(task.done() for task in tasks)
        assert calls.knocks == 1
        calls.gone.clear()
        calls.woken.set()
        answers = [tokens_of(chunks) for chunks in await asyncio.gather(*tasks)]
        assert all(len(tokens) == 8 for tokens in answers)
        await settle(calls)
        assert_idle(calls)


@pytest.mark.usefixtures("quick")
async def test_without_cold_starts_nobody_is_held() -> None:
    async with fleet() as (front, calls):
        calls.gone.add("r0")
        with pytest.raises(Unavailable):
            await collect(front, request("q"))
        assert not (await front.readiness()).ready


@pytest.mark.usefixtures("quick")
async def test_a_request_that_meets_a_leaving_replica_goes_to_another() -> None:
    async with fleet(replicas=2) as (front, calls):
        left = calls.replicas.pop("r0")  # it has just left, and the dispatcher does not know
        calls.serving = lambda replica_id: True  # type: ignore[method-assign]
        answers = await asyncio.gather(*(collect(front, request(f"q{i}")) for i in range(4)))
        assert all(len(tokens_of(chunks)) == 8 for chunks in answers)
        calls.replicas["r0"] = left


@pytest.mark.usefixtures("quick")
async def test_a_replica_that_leaves_finishes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No heartbeat reaches it any more; over a socket it sees that its dispatcher lives."""
    monkeypatch.setattr(replica_module, "LEASE_S", 0.1)
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    monkeypatch.setattr(replicas_module, "SILENT_S", 0.1)
    monkeypatch.setattr(replicas_module, "LOST_S", 0.2)

    class OverSockets(LocalCalls):
        def steps(self, replica_id: str):  # type: ignore[no-untyped-def]
            return connect(tmp_path / replica_id, self.identity)

    local = LocalReplica("r0", engine_config(), paced(0.005), sockets=tmp_path)
    calls = OverSockets("d0", local)
    front = await dispatcher(calls)
    task = asyncio.ensure_future(collect(front, request("q", max_tokens=150)))
    await asyncio.sleep(0.1)
    calls.gone.add("r0")
    assert len(tokens_of(await task)) == 150
    local.stop()


@pytest.mark.usefixtures("quick")
async def test_a_dispatcher_whose_socket_closes_loses_its_lease(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replica_module, "LEASE_S", 0.1)
    monkeypatch.setattr(replica_module, "HOUSEKEEPING_S", 0.02)
    local = LocalReplica("r0", engine_config(), paced(0.005), sockets=tmp_path)
    calls = LocalCalls("d0", local)
    task = asyncio.ensure_future(
        local.service.generate(encode_request(request("q", max_tokens=200)), "d0")
    )
    await asyncio.sleep(0.05)
    stream = connect(tmp_path / "r0", "d0")
    await anext(stream)
    await asyncio.sleep(0.3)
    assert not task.done(), "the socket keeps it"
    await stream.aclose()
    with pytest.raises(ConnectionError):
        await task
    await settle(calls)
    local.stop()


async def test_the_policy_sees_what_replicas_and_dispatchers_say() -> None:
    async with fleet() as (front, calls):
        await collect(front, request("q", prompt=8))
        await front._refresh()
        stats = await calls.replicas["r0"].service.record_autoscaling_stats()
        assert set(stats) == {*NUMBERS, *QUEUE, *BURN}
        assert all(isinstance(value, float) for value in stats.values())
        snapshot = calls.replicas["r0"].service.loop.snapshot
        pool = pool_of(context({"r0": stats}, target=1), 5)
        (replica,) = pool.replicas
        assert replica.busy_ns_total == snapshot.busy_ns_total > 0
        assert replica.prompt_tokens_total == 8
        assert (pool.arrived_requests_total, pool.arrived_tokens_total) == (1, 8)
        assert (pool.burn_minute, pool.burn_ten_minutes) == (0.0, 0.0)
        burning = pool_of(context({"r0": stats | {"burn_minute": 2.5}}, target=1), 5)
        assert burning.burn_minute == 2.5
        assert (pool.pool, pool.wanted, pool.taken) == (MIXED, 1, 5)
        assert not pool.shared_queue
        late = context({"r0": stats | {"first_burn_minute": 3.0}}, target=1)
        assert pool_of(late, 5, "prefill").burn_minute == 3.0
        assert pool_of(late, 5, "decode").burn_minute == 0.0, "its tokens are in time"
        own = pool_of(context({"r0": stats}, target=1), 5, "decode")
        assert own == replace(pool, pool="decode", shared_queue=True)


def test_at_zero_the_policy_hears_of_waiting_calls_only() -> None:
    pool = pool_of(context({}, target=1, calls=1.0), 7)
    assert (pool.replicas, pool.queued_requests, pool.wanted) == ((), 1, 1)


def test_the_policy_is_made_of_plain_data() -> None:
    """Serve hands the configuration over as JSON."""
    config = AutoscalerConfig(min_replicas=0, max_replicas=3, idle_s=5.0)
    words = json.loads(json.dumps({"pool": "prefill", **asdict(config)}))
    assert ScalingPolicy(**words).autoscaler.config == config


def test_each_pool_has_its_own_number_and_reason() -> None:
    """In metrics and in the table; a pool that is not scaled has neither."""
    said = {"why": "tokens wait", "changes_total": {"queue": 2}, "changes": []}
    scaling = [{"pool": pool, "wanted": n, **said} for pool, n in (("prefill", 3), ("decode", 1))]
    text = fleet_text("m", [], DispatcherReport(dispatcher_id="d0"), scaling)
    assert 'fabric_replicas_wanted{pool="prefill"} 3.0' in text
    assert 'fabric_scaling_changes_total{pool="decode",reason="queue"} 2.0' in text
    assert "fabric_replicas_wanted" not in fleet_text("m", [], DispatcherReport(dispatcher_id="d"))
    lines = _scaling(scaling, ["decode", "prefill", "prefill"])
    assert lines[1:] == [
        "prefill pool: 2 there, 3 wanted: tokens wait",
        "decode pool: 1 there, 1 wanted: tokens wait",
    ]
    assert _scaling([], ["mixed"]) == []


def context(
    stats: dict[str, dict[str, float]], *, target: int, calls: float = 0.0
) -> SimpleNamespace:
    """What Serve hands to a policy."""
    raw: dict[str, dict[SimpleNamespace, list[SimpleNamespace]]] = {}
    for replica, values in stats.items():
        key = Key(replica)
        for name, value in values.items():
            raw.setdefault(name, {})[key] = [SimpleNamespace(value=value)]  # type: ignore[index]
    return SimpleNamespace(raw_metrics=raw, target_num_replicas=target, total_num_requests=calls)


class Key:
    """Serve's `ReplicaID`."""

    def __init__(self, unique_id: str) -> None:
        self.unique_id = unique_id


@pytest.mark.usefixtures("quick")
async def test_missed_targets_reach_the_report() -> None:
    """Twelve requests of a tier whose first token is due before it can come."""
    hopeless = Tier(name="standard", ttft_ms=1, tpot_ms=1)
    async with fleet(step_s=0.003, tiers=(hopeless,)) as (front, calls):
        await asyncio.gather(*(collect(front, request(f"q{i}")) for i in range(12)))
        while not (report := front._own()).burn_minute:  # the next beat looks into the ledger
            await asyncio.sleep(0.01)
        assert report.burn_minute == report.burn_ten_minutes == pytest.approx(100.0)
        assert report.first_burn_minute == report.later_burn_ten_minutes == pytest.approx(100.0)
        await front._refresh()
        stats = await calls.replicas["r0"].service.record_autoscaling_stats()
        assert stats["burn_minute"] == pytest.approx(100.0)
