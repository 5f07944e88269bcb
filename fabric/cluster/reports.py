"""What replicas and dispatchers tell each other once a second; behind /metrics and `status`."""

from __future__ import annotations

import marshal
from dataclasses import dataclass, fields
from typing import Any

from fabric.cluster.wire import snapshot_from_row, snapshot_row
from fabric.core.snapshot import ReplicaSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramReport:
    """Counts per bucket (not cumulative; the last is +Inf) and the sum of the values, seconds."""

    name: str
    counts: tuple[int, ...]
    total: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherReport:
    """One ingress: what waits in front of the engines and what was sent away. Counters only grow.

    `series`: the gateway's own samples, as Prometheus names them with their labels. `page`,
    `demand`, `leases`: rows of `letters`, of the ledger and of what limits are split by.
    `degraded`: the ladder's level; `moves`: (rung, entered or left, times).
    """

    dispatcher_id: str
    queued_requests: int = 0
    queued_tokens: int = 0
    open_requests: int = 0
    open_handovers: int = 0
    arrived_requests_total: int = 0  # shed or not
    arrived_tokens_total: int = 0  # of their prompts
    burn_minute: float = 0.0  # of its worst tier's error budget
    burn_ten_minutes: float = 0.0
    first_burn_minute: float = 0.0  # of this, what first tokens are to blame for
    first_burn_ten_minutes: float = 0.0
    later_burn_minute: float = 0.0  # and the others
    later_burn_ten_minutes: float = 0.0
    admitted_total: int = 0
    shed_total: int = 0
    failed_total: int = 0
    resumed_total: int = 0  # times that a request went on at another replica
    poisoned_total: int = 0  # requests refused because engines broke under them
    series: tuple[tuple[str, float], ...] = ()
    queued_by_tier: tuple[int, ...] = ()
    page: tuple[Any, ...] = ()
    demand: tuple[Any, ...] = ()
    leases: tuple[Any, ...] = ()
    degraded: int = 0
    moves: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """One worker of a sharded replica. `node`: its machine's address. `holds`: which slice, in
    words. `expert_loads`: how many rows each of the model's experts got there since the start
    (empty without experts)."""

    tp_rank: int
    pp_rank: int
    ep_rank: int
    node: str
    pid: int
    weight_bytes: int
    kv_pool_bytes: int
    host_pool_bytes: int
    holds: str = ""
    expert_loads: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One engine replica. `stuck_s`: for how long its step in hand has been running.

    `context_limit`: the longest sequence it can hold, tokens. `load_s`: what loading took.
    `pid`: for `fabric status --memory`.
    `dispatchers`: all that hold a lease here; so one ingress knows of the others. `pool`: prefill,
    decode or mixed. `handover`: what its `Porter` counts.
    """

    snapshot: ReplicaSnapshot
    stuck_s: float
    error: str | None
    executor: str
    context_limit: int
    weight_bytes: int
    kv_pool_bytes: int
    host_pool_bytes: int
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    load_s: float
    pid: int
    histograms: tuple[HistogramReport, ...]
    finished: tuple[tuple[str, int], ...]
    dispatchers: tuple[DispatcherReport, ...]
    shards: tuple[ShardReport, ...] = ()
    rebuilds_total: int = 0  # times that its engine and workers were made anew
    hangs_total: int = 0  # of these, because a step was overdue
    pool: str = "mixed"
    handover: tuple[tuple[str, float], ...] = ()


def encode_dispatcher(report: DispatcherReport) -> bytes:
    """`DispatcherReport` as bytes."""
    return marshal.dumps(_row(report))


def decode_dispatcher(data: bytes) -> DispatcherReport:
    """The inverse of `encode_dispatcher`."""
    return DispatcherReport(**_named(DispatcherReport, marshal.loads(data)))


def encode_replica(report: ReplicaReport) -> bytes:
    """`ReplicaReport` as bytes."""
    values = _named(ReplicaReport, _row(report))
    values["snapshot"] = snapshot_row(report.snapshot)
    values["histograms"] = tuple(_row(one) for one in report.histograms)
    values["dispatchers"] = tuple(_row(one) for one in report.dispatchers)
    values["shards"] = tuple(_row(one) for one in report.shards)
    return marshal.dumps(tuple(values.values()))


def decode_replica(data: bytes) -> ReplicaReport:
    """The inverse of `encode_replica`."""
    values = _named(ReplicaReport, marshal.loads(data))
    values["snapshot"] = snapshot_from_row(values["snapshot"])
    values["histograms"] = tuple(
        HistogramReport(**_named(HistogramReport, row)) for row in values["histograms"]
    )
    values["dispatchers"] = tuple(
        DispatcherReport(**_named(DispatcherReport, row)) for row in values["dispatchers"]
    )
    values["shards"] = tuple(ShardReport(**_named(ShardReport, row)) for row in values["shards"])
    return ReplicaReport(**values)


def _row(record: Any) -> tuple[Any, ...]:
    return tuple(getattr(record, field.name) for field in fields(record))


def _named(kind: Any, row: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip((field.name for field in fields(kind)), row, strict=True))
