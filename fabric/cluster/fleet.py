"""The fleet in text: Prometheus metrics, and the record behind `fabric status`.

Every ingress can tell both: replicas report to all dispatchers, and pass on what others reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from fabric.cluster.detour import MEANING
from fabric.cluster.measures import BOUNDS
from fabric.cluster.processes import ProcessMemory
from fabric.cluster.reports import DispatcherReport, ReplicaReport
from fabric.core.snapshot import ReplicaSnapshot
from fabric.gateway.backend import Readiness, ServedModel
from fabric.gateway.counters import exposition

# Of a dispatcher's report: what only other dispatchers read.
LETTERS = ("series", "page", "demand", "leases")

Value = Callable[[ReplicaReport], float]

# Every series is labelled by replica; summed over it (the share: averaged) it is the fleet's.
# The names that vLLM has come first: dashboards and endpoint pickers read them.
GAUGES: Sequence[tuple[str, str, Value]] = (
    ("vllm:num_requests_running", "Sequences that hold KV blocks.", lambda r: r.snapshot.running),
    (
        "vllm:kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1; cached prefixes count as free.",
        lambda r: kv_usage(r.snapshot),
    ),
    ("fabric_requests_swapped", "Sequences in the host pool.", lambda r: r.snapshot.swapped),
    ("fabric_waiting_tokens", "Tokens to compute.", lambda r: r.snapshot.waiting_tokens),
    ("fabric_kv_blocks", "KV blocks of the pool.", lambda r: r.snapshot.blocks_total),
    ("fabric_kv_blocks_free", "KV blocks free or evictable.", lambda r: r.snapshot.blocks_free),
    ("fabric_kv_blocks_cached", "KV blocks with a prefix.", lambda r: r.snapshot.blocks_cached),
    ("fabric_host_blocks", "Blocks of the host pool.", lambda r: r.snapshot.host_blocks_total),
    ("fabric_host_blocks_free", "Free host blocks.", lambda r: r.snapshot.host_blocks_free),
    ("fabric_weight_bytes", "Resident bytes of weights.", lambda r: r.weight_bytes),
    ("fabric_kv_pool_bytes", "Bytes of the KV pool.", lambda r: r.kv_pool_bytes),
    ("fabric_host_pool_bytes", "Bytes of the host pool.", lambda r: r.host_pool_bytes),
    ("fabric_step_stuck_seconds", "How long a step hangs; 0: none does.", lambda r: r.stuck_s),
)
COUNTERS: Sequence[tuple[str, str, Value]] = (
    (
        "vllm:prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda r: r.snapshot.prefix_queries_total,
    ),
    ("vllm:prefix_cache_hits", "Tokens found.", lambda r: r.snapshot.prefix_hits_total),
    ("vllm:num_preemptions", "Preemptions.", lambda r: r.snapshot.preemptions_total),
    ("vllm:prompt_tokens", "Prompt tokens computed.", lambda r: r.snapshot.prompt_tokens_total),
    ("vllm:generation_tokens", "Tokens made.", lambda r: r.snapshot.generated_tokens_total),
    ("fabric_swaps", "Preemptions that swapped.", lambda r: r.snapshot.swaps_total),
    ("fabric_steps", "Engine steps.", lambda r: r.snapshot.steps_total),
    ("fabric_choices_aborted", "Choices that were aborted.", lambda r: r.snapshot.aborted_total),
    (
        "fabric_engine_rebuilds",
        "Times that engine and workers were made anew.",
        lambda r: r.rebuilds_total,
    ),
    ("fabric_step_deadline_hits", "Of these, because a worker hung.", lambda r: r.hangs_total),
)


def fleet_text(
    model: str,
    replicas: Sequence[ReplicaReport],
    own: DispatcherReport,
    scaling: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Prometheus text, format 0.0.4. `scaling`: what each pool's autoscaler said last."""
    registry = CollectorRegistry(auto_describe=False)
    metrics = [*_of_replicas(model, replicas), *_of_fleet(replicas, own)]
    if scaling:
        metrics += _of_scaling(scaling)
    registry.register(_Collected([*metrics, _waiting(model, replicas, own)]))
    return generate_latest(registry).decode() + exposition(_summed_series(replicas, own), MEANING)


def fleet_status(
    model: ServedModel,
    readiness: Readiness,
    replicas: Sequence[ReplicaReport],
    own: DispatcherReport,
    processes: Sequence[ProcessMemory],
) -> dict[str, object]:
    """JSON-able data. Bytes, tokens and counts as the keys say."""
    ingresses = dispatchers(replicas, own)
    return {
        "model": {"name": model.name, "version": model.version},
        "ready": readiness.ready,
        "reason": readiness.reason,
        "replicas": [_replica_row(one) for one in replicas],
        "ingresses": [
            {key: value for key, value in asdict(one).items() if key not in LETTERS}
            for one in ingresses
        ],
        "processes": [asdict(one) for one in processes],
    }


def kv_usage(snapshot: ReplicaSnapshot) -> float:
    """The share of blocks that running sequences hold."""
    if not snapshot.blocks_total:
        return 0.0
    return (snapshot.blocks_total - snapshot.blocks_free) / snapshot.blocks_total


def dispatchers(replicas: Iterable[ReplicaReport], own: DispatcherReport) -> list[DispatcherReport]:
    """Every ingress once; this one as it is now."""
    known = {one.dispatcher_id: one for replica in replicas for one in replica.dispatchers}
    known[own.dispatcher_id] = own
    return [known[name] for name in sorted(known)]


class _Collected:
    """What prometheus_client wants for a registry: an object with `collect`."""

    def __init__(self, metrics: Sequence[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The metrics."""
        return iter(self._metrics)


def _of_replicas(model: str, replicas: Sequence[ReplicaReport]) -> Iterator[Metric]:
    labels = ["model_name", "replica"]
    for name, text, value in GAUGES:
        gauge = GaugeMetricFamily(name, text, labels=labels)
        for replica in replicas:
            gauge.add_metric([model, replica.snapshot.replica_id], value(replica))
        yield gauge
    for name, text, value in COUNTERS:
        counter = CounterMetricFamily(name, text, labels=labels)
        for replica in replicas:
            counter.add_metric([model, replica.snapshot.replica_id], value(replica))
        yield counter
    finished = CounterMetricFamily(
        "vllm:request_success", "Choices by why they ended.", labels=[*labels, "finished_reason"]
    )
    for replica in replicas:
        for reason, count in replica.finished:
            finished.add_metric([model, replica.snapshot.replica_id, reason], count)
    yield finished
    handed = CounterMetricFamily(
        "fabric_handover", "KV groups between replicas.", labels=[*labels, "what"]
    )
    for replica in replicas:
        for what, amount in replica.handover:
            handed.add_metric([model, replica.snapshot.replica_id, what], amount)
    yield handed
    yield from _of_shards(model, replicas)
    for name, bounds in BOUNDS.items():
        histogram = HistogramMetricFamily(f"vllm:{name}", "From arrival; seconds.", labels=labels)
        for replica in replicas:
            report = next(one for one in replica.histograms if one.name == name)
            edges = [*(str(float(bound)) for bound in bounds), "+Inf"]
            buckets = list(zip(edges, accumulate(report.counts), strict=True))
            histogram.add_metric([model, replica.snapshot.replica_id], buckets, report.total)
        yield histogram


def _of_shards(model: str, replicas: Sequence[ReplicaReport]) -> Iterator[Metric]:
    labels = ["model_name", "replica", "tp_rank", "pp_rank", "ep_rank"]
    weights = GaugeMetricFamily("fabric_shard_weight_bytes", "Weights of a worker.", labels=labels)
    pools = GaugeMetricFamily("fabric_shard_kv_pool_bytes", "A worker's KV pool.", labels=labels)
    loads = CounterMetricFamily(
        "fabric_expert_rows",
        "Rows that an expert got, all layers and workers.",
        labels=["model_name", "replica", "expert"],
    )
    for replica in replicas:
        name = replica.snapshot.replica_id
        for one in replica.shards:
            ranks = [str(one.tp_rank), str(one.pp_rank), str(one.ep_rank)]
            weights.add_metric([model, name, *ranks], one.weight_bytes)
            pools.add_metric([model, name, *ranks], one.kv_pool_bytes)
        by_expert = [one.expert_loads for one in replica.shards if one.expert_loads]
        for expert, rows in enumerate(map(sum, zip(*by_expert, strict=True))):
            loads.add_metric([model, name, str(expert)], rows)
    yield from (weights, pools, loads)


def _waiting(model: str, replicas: Sequence[ReplicaReport], own: DispatcherReport) -> Metric:
    """In the engines and, where order is decided, in the queues of the ingresses."""
    gauge = GaugeMetricFamily(
        "vllm:num_requests_waiting",
        "What waits: sequences in an engine, requests in an ingress's queue.",
        labels=["model_name", "replica"],
    )
    for replica in replicas:
        waiting = replica.snapshot.waiting + replica.snapshot.swapped
        gauge.add_metric([model, replica.snapshot.replica_id], waiting)
    for front in dispatchers(replicas, own):
        gauge.add_metric([model, f"ingress:{front.dispatcher_id}"], front.queued_requests)
    return gauge


def _of_fleet(replicas: Sequence[ReplicaReport], own: DispatcherReport) -> Iterator[Metric]:
    fronts = dispatchers(replicas, own)
    yield _gauge("fabric_replicas", "Engine replicas that answer.", len(replicas))
    yield _gauge("fabric_ingresses", "HTTP front processes.", len(fronts))
    running = sum(one.snapshot.running for one in replicas)
    in_engines = sum(one.snapshot.waiting + one.snapshot.swapped for one in replicas)
    queued = sum(one.queued_requests for one in fronts)
    yield _gauge("fabric_fleet_requests_running", "Sequences that run, all replicas.", running)
    yield _gauge(
        "fabric_fleet_requests_waiting", "Waiting in engines and queues.", in_engines + queued
    )
    yield _gauge("fabric_queue_requests", "Requests queued in front of the engines.", queued)
    tokens = sum(one.queued_tokens for one in fronts)
    yield _gauge("fabric_queue_tokens", "Their prompt tokens.", tokens)
    yield _gauge(
        "fabric_open_requests",
        "Requests that hold a call to a replica.",
        sum(one.open_requests for one in fronts),
    )
    yield _gauge(
        "fabric_open_handovers",
        "Requests on their way from one pool to the other.",
        sum(one.open_handovers for one in fronts),
    )
    for name, text, total in (
        ("fabric_requests_admitted", "Requests taken.", sum(f.admitted_total for f in fronts)),
        ("fabric_requests_shed", "Requests turned away.", sum(f.shed_total for f in fronts)),
        (
            "fabric_requests_failed",
            "Requests that could not go on.",
            sum(f.failed_total for f in fronts),
        ),
        (
            "fabric_requests_resumed",
            "Times that a request went on at another replica.",
            sum(f.resumed_total for f in fronts),
        ),
        (
            "fabric_requests_poisonous",
            "Requests refused because engines broke under them.",
            sum(f.poisoned_total for f in fronts),
        ),
    ):
        yield CounterMetricFamily(name, text, value=total)


def _of_scaling(scaling: Sequence[Mapping[str, Any]]) -> list[Metric]:
    wanted = GaugeMetricFamily(
        "fabric_replicas_wanted", "Replicas that a pool's autoscaler asks for.", labels=["pool"]
    )
    changes = CounterMetricFamily(
        "fabric_scaling_changes",
        "Changes of the number wanted, by reason.",
        labels=["pool", "reason"],
    )
    for one in scaling:
        wanted.add_metric([one["pool"]], one["wanted"])
        for reason, count in one["changes_total"].items():
            changes.add_metric([one["pool"], reason], count)
    return [wanted, changes]


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _summed_series(replicas: Sequence[ReplicaReport], own: DispatcherReport) -> dict[str, float]:
    total: dict[str, float] = {}
    for front in dispatchers(replicas, own):
        for series, value in front.series:
            total[series] = total.get(series, 0.0) + value
    return total


def _replica_row(replica: ReplicaReport) -> dict[str, object]:
    snapshot = replica.snapshot
    queries = snapshot.prefix_queries_total
    return {
        "replica": snapshot.replica_id,
        "pid": replica.pid,
        "load_s": replica.load_s,
        "executor": replica.executor,
        "error": replica.error,
        "context_limit": replica.context_limit,
        "weight_bytes": replica.weight_bytes,
        "kv_pool_bytes": replica.kv_pool_bytes,
        "host_pool_bytes": replica.host_pool_bytes,
        "kv_usage": kv_usage(snapshot),
        "host_usage": 1 - snapshot.host_blocks_free / max(snapshot.host_blocks_total, 1)
        if snapshot.host_blocks_total
        else 0.0,
        "running": snapshot.running,
        "waiting": snapshot.waiting,
        "swapped": snapshot.swapped,
        "prefix_hit_rate": snapshot.prefix_hits_total / queries if queries else 0.0,
        "prompt_tokens_per_s": replica.prompt_tokens_per_s,
        "generated_tokens_per_s": replica.generated_tokens_per_s,
        "preemptions_total": snapshot.preemptions_total,
        "generated_tokens_total": snapshot.generated_tokens_total,
        "shards": [asdict(one) for one in replica.shards],
        "pool": replica.pool,
        "handover": dict(replica.handover),
    }
