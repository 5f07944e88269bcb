"""The Ray Serve application, and the environment it needs.

    HAProxy ──> ingress replicas ──────────────> engine replicas
                gateway + dispatcher, no torch   engine + worker, one model each

Ray and Serve read their switches from the environment when they are imported, and their processes
inherit it. So `prepare_environment` comes first, and Ray is imported inside the functions here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fabric.cluster.bundles import Bundles
from fabric.cluster.haproxy import write_wrapper
from fabric.cluster.run import Run
from fabric.config import FabricConfig
from fabric.config.pools import PoolSection
from fabric.gateway.backend import ServedModel

NAME = "fabric"
ENGINE = "engine"
PREFILL = "prefill"
DECODE = "decode"
INGRESS = "ingress"
# Serve's own limit must never bite: admission and head-room decide how much is open.
MAX_ONGOING = 100_000
FIRST_REPLICA_PORT, LAST_REPLICA_PORT = 30_000, 40_000
# Ray gives one unit of it to the head node. HTTP comes in there, and only there.
HEAD = "node:__internal_head__"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ports:
    """Ports on loopback that this instance keeps to itself. `fallback`: Serve's Python proxy."""

    metrics: int
    stats: int
    fallback: int
    replicas: int  # the first of a range for ingress replicas


def prepare_environment(config: FabricConfig, folder: Path) -> None:
    """Set what Ray and Serve read at import and at start. `folder`: private to this instance."""
    wrapper = write_wrapper(folder, host=config.server.host, port=config.server.port)
    os.environ.update(
        serve_environment(folder, wrapper)
        | {
            "RAY_USAGE_STATS_ENABLED": "0",
            # Else Ray takes the machine's outer address for 127.0.0.1, listens there, and replicas
            # look for each other there; the switch is meant for laptops' firewalls.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_AUTH_MODE": "disabled",  # explicit: `ray.init` would write a token file otherwise
            "RAY_enable_metrics_collection": "0",
            "RAY_task_events_report_interval_ms": "0",
            "RAY_worker_niceness": "0",  # 15 by default: the engine must not stand back
            # One machine: a slow process is a busy machine, not a lost node.
            "RAY_raylet_start_wait_time_s": "300",
            "RAY_gcs_server_port_wait_time_s": "300",
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_worker_register_timeout_seconds": "300",
            "RAY_health_check_timeout_ms": "60000",
        }
    )


def serve_environment(folder: Path, wrapper: Path) -> dict[str, str]:
    """What Serve reads of HAProxy and speed. `folder`: private to this machine's HAProxy."""
    ports = _free_ports()
    proxy = folder / "h"
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Ten times a second, the default, costs 3 % of a core for nothing.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(proxy / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(proxy / "a.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(proxy),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(proxy / "state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(proxy / "m.sock"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.stats),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, cores() // 4)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.replicas),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.replicas + 999),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def import_ray() -> None:
    """Import the heavy part of what `deploy` needs, after `prepare_environment`."""
    import ray.serve  # noqa: F401


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def worker_threads(config: FabricConfig) -> int:
    """CPU threads of one worker: what is asked for, or its part of this machine."""
    return config.model.threads or max(1, cores() // config.most_workers)


def cluster_threads(config: FabricConfig) -> int:
    """CPU threads, and Ray's CPU slots, of one worker on a cluster: what is asked for, or a
    replica's workers share a machine like this one."""
    return config.model.threads or max(1, cores() // config.shard.core().workers)


def ray_cpus(config: FabricConfig) -> int:
    """CPU slots of a Ray of our own. Where workers have more threads than there are cores they
    share them; a placement group that waits for a slot would wait for ever."""
    return max(cores(), config.most_workers * worker_threads(config))


def build_application(config: FabricConfig, model: ServedModel, run: Run) -> Any:
    """The application for `serve.run`."""
    from ray import serve

    from fabric.cluster.calls import OwnPool
    from fabric.cluster.ingress import Ingress

    if config.pools is None:
        lends = config.kv.prefix_fetch is not None
        peer = OwnPool(deployment=ENGINE, application=NAME) if lends else None
        engines = {ENGINE: _engines(ENGINE, config, model, run, peer)}
    else:
        second, first = (
            pool_config(config, pool, run) for pool in (config.pools.decode, config.pools.prefill)
        )
        decode = _engines(DECODE, second, model, run)
        prefill = _engines(PREFILL, first, model, run, decode)
        engines = {DECODE: decode, PREFILL: prefill}
    return serve.deployment(
        serve.ingress(None)(Ingress),
        name=INGRESS,
        num_replicas=config.server.ingress_replicas,
        max_ongoing_requests=MAX_ONGOING,
        **_lifecycle(config),
        **_ingress_claims(run),
    ).bind(engines, config, model, run)


def pool_config(config: FabricConfig, pool: PoolSection, run: Run) -> FabricConfig:
    """One pool's replicas as if they were all there is."""
    threads = config.model.threads if run.on_cluster else worker_threads(config)
    chunk_tokens = pool.chunk_tokens or config.engine.chunk_tokens
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"threads": threads}),
            "engine": config.engine.model_copy(update={"chunk_tokens": chunk_tokens}),
            "shard": pool.shard,
            "replicas": pool.replicas,
            "autoscaling": pool.autoscaling,
            "pools": None,
        }
    )


def _engines(
    name: str, config: FabricConfig, model: ServedModel, run: Run, peer: Any = None
) -> Any:
    """A deployment of engine replicas. `peer`: the decode pool, for those of the prefill pool; its
    own, where replicas lend each other prefixes."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from fabric.cluster.engine_replica import EngineReplica
    from fabric.cluster.loading import Loader
    from fabric.cluster.serve_policies import ChosenReplicaRouter

    threads = cluster_threads(config) if run.on_cluster else worker_threads(config)
    bundles = _bundles(config, threads)
    loader = Loader(
        config=config,
        folder=model.folder,
        bundles=bundles,
        threads=threads,
        cache=run.cache,
        hands_over=peer is not None or name != ENGINE,
    )
    pool = "mixed" if name == ENGINE else name
    return serve.deployment(
        EngineReplica,
        name=name,
        **_replicas(pool, config),
        max_ongoing_requests=MAX_ONGOING,
        request_router_config=RequestRouterConfig(request_router_class=ChosenReplicaRouter),
        **_placement(bundles),
        **_lifecycle(config),
        **_engine_claims(bundles, run),
    ).bind(loader, run.sockets, pool, peer)


def deploy(config: FabricConfig, model: ServedModel, run: Run) -> None:
    """Start Serve with the application on a running Ray; returns while it loads."""
    from ray import serve
    from ray.serve._private import api
    from ray.serve.config import ControllerOptions, HTTPOptions
    from ray.serve.schema import LoggingConfig

    assert run.sockets is not None
    run.sockets.mkdir(mode=0o700)
    logging = LoggingConfig(logs_dir=str(run.logs), enable_access_log=False)
    # The ingress replicas and Serve's own proxy stay on loopback whatever `host` is: clients come
    # through HAProxy.
    http = HTTPOptions(host="127.0.0.1", port=config.server.port)
    # What `serve.start` does but its last step, which waits for the proxies: seconds in which the
    # replicas can be loading, and a proxy that Serve replaces meanwhile would be an error.
    api._create_controller_and_proxy_refs(
        http_options=http,
        grpc_options=None,
        global_logging_config=logging,
        global_tracing_config=None,
        controller_options=ControllerOptions(),
    )
    application = build_application(config, model, run)
    target = serve.RunTarget(application, name=NAME, logging_config=logging)
    serve.run_many(
        [target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False
    )


def ingress_handle() -> Any:
    """For calls from outside of the application."""
    from ray import serve

    handle = serve.get_deployment_handle(INGRESS, NAME)
    handle._init(_run_router_in_separate_loop=True)  # this thread has no loop
    return handle


def _bundles(config: FabricConfig, threads: int) -> Bundles:
    import ray

    resources: dict[str, float] = {"CPU": threads}
    device = config.model.device
    if device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU")):
        resources["GPU"] = 1
    return Bundles(
        spec=config.shard.core(),
        per_worker=config.shard.bundle == "worker",
        resources=resources,
    )


def _placement(bundles: Bundles) -> Mapping[str, Any]:
    """A worker that is alone lives in the replica's own process and needs no placement group."""
    if bundles.spec.workers == 1:
        return {}
    return {"placement_group_bundles": bundles.all(), "placement_group_strategy": "PACK"}


def _replicas(pool: str, config: FabricConfig) -> Mapping[str, Any]:
    """Their number, or who decides it."""
    from fabric.cluster.scaling import serve_autoscaling

    if config.autoscaling is None:
        return {"num_replicas": config.replicas}
    scaling = serve_autoscaling(pool, config.autoscaling.core(), config.journal)
    return {"autoscaling_config": scaling}


def _lifecycle(config: FabricConfig) -> Mapping[str, Any]:
    return {
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": config.server.drain_timeout_s + 5,
    }


def _engine_claims(bundles: Bundles, run: Run) -> Mapping[str, Any]:
    """What an engine replica asks of Ray, and how it is replaced."""
    if not run.on_cluster:
        # Replicas share the machine; Ray's CPU slots would only keep some of them from starting.
        return {"ray_actor_options": {"num_cpus": 0}}
    if bundles.spec.workers > 1:  # its placement group has it all
        return {"ray_actor_options": {"num_cpus": 0}, "max_surge_percent": 100}
    needs = {"num_cpus": bundles.resources["CPU"], "num_gpus": bundles.resources.get("GPU", 0)}
    return {"ray_actor_options": needs, "max_surge_percent": 100}


def _ingress_claims(run: Run) -> Mapping[str, Any]:
    """On a cluster: beside HAProxy on the head; in an update the new one comes first."""
    if not run.on_cluster:
        return {"ray_actor_options": {"num_cpus": 0}}
    options = {"num_cpus": 0, "resources": {HEAD: 0.001}}
    return {"ray_actor_options": options, "max_surge_percent": 100}


def _free_ports() -> Ports:
    """Ports that nobody listens on right now, from where the system gives none to others."""
    taken: list[int] = []
    for port in range(FIRST_REPLICA_PORT + os.getpid() % 997, LAST_REPLICA_PORT):
        if len(taken) == 3:
            break
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        taken.append(port)
    metrics, stats, fallback = taken
    return Ports(metrics=metrics, stats=stats, fallback=fallback, replicas=fallback + 1)
