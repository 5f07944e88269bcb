"""Serve asks how many engine replicas there should be; the core's `Autoscaler` answers.

    replica ── its snapshot, what dispatchers told it ──> Serve's controller ──> ScalingPolicy
                                                               │ Autoscaler.decide
    fabric status, /metrics <── why, by way of Ray's store ────┘

Each pool has a policy of its own, with its own limits. Serve calls them in its control loop. The
step from zero to one is Serve's own: a call that waits for a replica wakes it. What is said here is
done at once: all delays are the autoscaler's.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from math import ceil
from typing import Any

from fabric.cluster.journal import recorder_of
from fabric.config.journal import JournalSection
from fabric.core.configs import AutoscalerConfig, ForecastConfig
from fabric.core.control.autoscaler import Autoscaler, Target
from fabric.core.journal import watched
from fabric.core.snapshot import PoolSnapshot, ReplicaSnapshot

MIXED = "mixed"
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
# Which of the burn rates of `DispatcherReport` a pool can do something about.
BURNS: Mapping[str, tuple[str, str]] = {
    MIXED: ("burn_minute", "burn_ten_minutes"),
    "prefill": ("first_burn_minute", "first_burn_ten_minutes"),
    "decode": ("later_burn_minute", "later_burn_ten_minutes"),
}
BURN = tuple(name for names in BURNS.values() for name in names)

log = logging.getLogger("ray.serve")


class ScalingPolicy:
    """Serve makes one of it in its controller and calls it about twice a second."""

    def __init__(
        self, pool: str = MIXED, journal: dict[str, Any] | None = None, **config: Any
    ) -> None:
        self._pool = pool
        forecast = ForecastConfig(**config.pop("forecast"))
        autoscaler = Autoscaler(AutoscalerConfig(forecast=forecast, **config))
        section = None if journal is None else JournalSection(**journal)
        self.autoscaler = watched(recorder_of(section, "autoscaler", pool), pool, autoscaler)
        self._signals: Counter[str] = Counter()
        self._changes: deque[dict[str, Any]] = deque(maxlen=CHANGES_KEPT)
        self._told = ""

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Serve's `AutoscalingContext` -> how many replicas, and no state for Serve to keep."""
        now = time.time_ns()
        pool = pool_of(context, now, self._pool)
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
            log.warning(
                "pool %s: %d -> %d replicas: %s",
                *(pool.pool, pool.wanted, target.replicas, target.why),
            )
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
            internal_kv._internal_kv_put(_key(pool.pool), text.encode())


def pool_of(context: Any, now: int, name: str = MIXED) -> PoolSnapshot:
    """What Serve's context says of the pool. At zero replicas only Serve knows of waiting calls."""
    shared = name != MIXED
    minute, ten_minutes = BURNS[name]
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
            pool=name,
            taken=now,
            wanted=context.target_num_replicas,
            shared_queue=shared,
            queued_requests=ceil(context.total_num_requests),
        )
    return PoolSnapshot(
        pool=name,
        taken=now,
        wanted=context.target_num_replicas,
        shared_queue=shared,
        replicas=replicas,
        burn_minute=latest[minute][best],
        burn_ten_minutes=latest[ten_minutes][best],
        **{name: int(latest[name][best]) for name in QUEUE},
    )


def serve_autoscaling(
    pool: str, config: AutoscalerConfig, journal: JournalSection | None = None
) -> Any:
    """The `autoscaling_config` of a deployment: Serve's own smoothing and delays are off."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    words = asdict(config) | {"pool": pool, "journal": journal and journal.model_dump()}
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


def scaling_records(pools: Sequence[str]) -> list[dict[str, Any]]:
    """What the policies of these pools said last; of those that have been asked yet."""
    from ray.experimental import internal_kv

    values = [internal_kv._internal_kv_get(_key(pool)) for pool in pools]
    return [json.loads(value) for value in values if value is not None]


def _key(pool: str) -> bytes:
    return f"fabric-scaling/{pool}".encode()
