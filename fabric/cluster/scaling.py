"""Serve asks how many engine replicas there should be; the core's `Autoscaler` answers.

    replica ── its snapshot, what dispatchers told it ──> Serve's controller ──> ScalingPolicy
                                                               │ Autoscaler.decide
    fabric status, /metrics <── why, by way of Ray's store ────┘

Serve calls the policy in its control loop. The step from zero to one is Serve's own: a call that
waits for a replica wakes it. What is said here is done at once: all delays are the autoscaler's.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from dataclasses import asdict, fields, replace
from math import ceil
from typing import Any

from fabric.cluster.journal import recorder_of
from fabric.config.journal import JournalSection
from fabric.core.configs import AutoscalerConfig, ForecastConfig
from fabric.core.control.autoscaler import Autoscaler, Target
from fabric.core.journal import watched
from fabric.core.snapshot import PoolSnapshot, ReplicaSnapshot

POOL = "mixed"
KEY = b"fabric-scaling/mixed"
CHANGES_KEPT = 20
NS_PER_S = 1_000_000_000
METRICS_INTERVAL_S = 0.5
LOOK_BACK_S = 2.0
# Numbers of a snapshot that travel as Serve's custom metrics; the rest has its default.
NUMBERS = tuple(one.name for one in fields(ReplicaSnapshot) if one.type == "int")
QUEUE = (
    "queued_requests",
    "queued_tokens",
    "arrived_requests_total",
    "arrived_tokens_total",
)
BURN = ("burn_minute", "burn_ten_minutes")

log = logging.getLogger("ray.serve")


class ScalingPolicy:
    """Serve makes one of it in its controller and calls it about twice a second."""

    def __init__(self, journal: dict[str, Any] | None = None, **config: Any) -> None:
        forecast = ForecastConfig(**config.pop("forecast"))
        autoscaler = Autoscaler(AutoscalerConfig(forecast=forecast, **config))
        section = None if journal is None else JournalSection(**journal)
        self.autoscaler = watched(recorder_of(section, "autoscaler", POOL), POOL, autoscaler)
        self._signals: Counter[str] = Counter()
        self._changes: deque[dict[str, Any]] = deque(maxlen=CHANGES_KEPT)
        self._told = ""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's `AutoscalingContext` -> how many replicas, and no state for Serve to keep."""
        now = time.time_ns()
        pool = pool_of(context, now)
        target = self.autoscaler.decide(pool, now)
        if target.replicas != pool.wanted:
            self._signals[target.signal.value] += 1
            self._changes.append(
                {
                    "at_s": now // NS_PER_S,
                    "before": pool.wanted,
                    "after": target.replicas,
                    "why": target.why,
                }
            )
            log.warning("%d -> %d replicas: %s", pool.wanted, target.replicas, target.why)
        self._tell(pool, target)
        return target.replicas, {}

    def _tell(self, pool: PoolSnapshot, target: Target) -> None:
        from ray.experimental import internal_kv

        record = {
            "pool": pool.pool,
            "wanted": target.replicas,
            "why": target.why,
            "signal": target.signal.value,
            "changes_total": dict(sorted(self._signals.items())),
            "changes": list(self._changes),
        }
        text = json.dumps(record)
        if text != self._told:
            self._told = text
            internal_kv._internal_kv_put(KEY, text.encode())


def pool_of(context: Any, now: int) -> PoolSnapshot:
    """What Serve's context says of the pool. At zero replicas only Serve knows of waiting calls."""
    latest = {
        name: {
            replica.unique_id: series[-1].value for replica, series in by_replica.items() if series
        }
        for name, by_replica in context.raw_metrics.items()
        if name in (*NUMBERS, *QUEUE, *BURN)
    }
    known = latest.get("taken", {})
    replicas = tuple(
        replace(
            ReplicaSnapshot(replica_id=one, taken=0),
            **{name: int(latest[name][one]) for name in NUMBERS},  # type: ignore[arg-type]
        )
        for one in sorted(known)
    )
    # Every replica hears of every dispatcher; whoever has heard of most arrivals heard last.
    heard = latest.get("arrived_requests_total", {})
    best = max(sorted(heard), key=lambda one: heard[one], default=None)
    if best is None:
        return PoolSnapshot(
            pool=POOL,
            taken=now,
            wanted=context.target_num_replicas,
            queued_requests=ceil(context.total_num_requests),
        )
    return PoolSnapshot(
        pool=POOL,
        taken=now,
        wanted=context.target_num_replicas,
        replicas=replicas,
        burn_minute=latest["burn_minute"][best],
        burn_ten_minutes=latest["burn_ten_minutes"][best],
        **{name: int(latest[name][best]) for name in QUEUE},
    )


def serve_autoscaling(config: AutoscalerConfig, journal: JournalSection | None = None) -> Any:
    """The `autoscaling_config` of a deployment: Serve's own smoothing and delays are off."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    words = asdict(config) | {"journal": journal and journal.model_dump()}
    return AutoscalingConfig(
        min_replicas=config.min_replicas,
        initial_replicas=max(1, config.min_replicas),
        max_replicas=config.max_replicas,
        metrics_interval_s=METRICS_INTERVAL_S,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=AutoscalingPolicy(policy_function=ScalingPolicy, policy_kwargs=words),
    )


def scaling_record() -> dict[str, Any] | None:
    """What the policy said last; None: it has not been asked yet."""
    from ray.experimental import internal_kv

    value = internal_kv._internal_kv_get(KEY)
    record: dict[str, Any] | None = None if value is None else json.loads(value)
    return record
