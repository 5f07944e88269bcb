"""What a replica says of itself in a heartbeat."""

from __future__ import annotations

from fabric.cluster.measures import Measures
from fabric.cluster.reports import ReplicaReport
from fabric.core.snapshot import ReplicaSnapshot


def report_of(snapshot: ReplicaSnapshot) -> ReplicaReport:
    """The report of a replica that is well."""
    return ReplicaReport(
        snapshot=snapshot,
        stuck_s=0.0,
        error=None,
        executor="C++",
        context_limit=64,
        weight_bytes=6 << 20,
        kv_pool_bytes=10 << 20,
        host_pool_bytes=14 << 20,
        prompt_tokens_per_s=0.0,
        generated_tokens_per_s=0.0,
        load_s=1.0,
        pid=70,
        histograms=tuple(one.report() for one in Measures().histograms.values()),
        finished=(),
        dispatchers=(),
    )
