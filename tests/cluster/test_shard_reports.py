"""What is told of a sharded replica's workers, in metrics and in `fabric status`."""

from __future__ import annotations

from dataclasses import replace

from kit.reports import report_of

from fabric.cluster.fleet import fleet_status, fleet_text
from fabric.cluster.reports import DispatcherReport, ShardReport
from fabric.cluster.status import render
from fabric.core.snapshot import ReplicaSnapshot
from fabric.gateway.backend import Readiness, ServedModel

SHARD = ShardReport(
    tp_rank=0,
    pp_rank=0,
    ep_rank=0,
    node="10.0.0.1",
    pid=71,
    weight_bytes=3 << 20,
    kv_pool_bytes=5 << 20,
    host_pool_bytes=7 << 20,
    holds="heads",
    expert_loads=(4, 0, 9),
)
REPORT = replace(
    report_of(ReplicaSnapshot(replica_id="r0", taken=0)),
    shards=(SHARD, replace(SHARD, tp_rank=1, ep_rank=1, pid=72, expert_loads=(1, 2, 0))),
)
FRONT = DispatcherReport(dispatcher_id="d0")
MODEL = ServedModel(
    name="m", version="1", created=0, context_limit=64, vocab=9, eos_token_ids=(), folder=""
)


def test_metrics_tell_each_workers_bytes_and_sum_the_experts_over_workers() -> None:
    lines = fleet_text("m", [REPORT], FRONT).splitlines()
    worker = 'ep_rank="1",model_name="m",pp_rank="0",replica="r0",tp_rank="1"'
    assert f"fabric_shard_weight_bytes{{{worker}}} 3.145728e+06" in lines
    assert f"fabric_shard_kv_pool_bytes{{{worker}}} 5.24288e+06" in lines
    for expert, rows in enumerate((5, 2, 9)):
        series = f'fabric_expert_rows_total{{expert="{expert}",model_name="m",replica="r0"}}'
        assert f"{series} {float(rows)}" in lines


def test_status_lists_the_workers() -> None:
    record = fleet_status(MODEL, Readiness(ready=True, reason=""), [REPORT], FRONT, [])
    rows = [line.split() for line in render(record).splitlines()]
    assert ["r0", "0", "0", "0", "10.0.0.1", "71", "3", "5", "7", "heads"] in rows
    assert ["r0", "1", "0", "1", "10.0.0.1", "72", "3", "5", "7", "heads"] in rows
    alone = fleet_status(
        MODEL, Readiness(ready=True, reason=""), [replace(REPORT, shards=())], FRONT, []
    )
    assert "worker of" not in render(alone)
