"""One HTTP front process: the gateway's app and the dispatcher behind it. No torch in here."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle

from fabric.cluster.calls import EngineCalls
from fabric.cluster.dispatcher import Dispatcher, Policy
from fabric.cluster.journal import recorder_of
from fabric.cluster.run import Run
from fabric.cluster.serve_policies import bind_replica_server_to_loopback
from fabric.config import FabricConfig
from fabric.config.parts import admission_of, router_of
from fabric.gateway.api import create_app
from fabric.gateway.backend import ServedModel
from fabric.gateway.logs import log_to
from fabric.gateway.settings import GatewaySettings, KeyHolder


class Ingress:
    """The deployment class; `serve.ingress` puts its ASGI app behind a port of its own."""

    def __init__(
        self,
        engine: DeploymentHandle,
        config: FabricConfig,
        model: ServedModel,
        run: Run,
    ) -> None:
        bind_replica_server_to_loopback()
        self._config = config
        identity = serve.get_replica_context().replica_id.unique_id
        log_to(run.logs / f"requests-{identity}.jsonl")
        scaling = config.autoscaling
        cold_starts = scaling is not None and not scaling.min_replicas
        self.dispatcher = Dispatcher(
            EngineCalls(engine, identity, run.sockets, cold_starts=cold_starts),
            identity=identity,
            model=model,
            policy=Policy(
                admission=admission_of(config),
                router=router_of(config),
                dispatchers=config.server.ingress_replicas,
                objective=config.slo.objective,
                degrade=config.slo.degrade(),
            ),
            launcher_pid=run.launcher_pid,
            journal=recorder_of(
                config.journal, "dispatcher", identity, keyed=config.router.policy != "affinity"
            ),
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Called by Serve on the loop that will serve."""
        self.dispatcher.start()
        settings = GatewaySettings(
            api_keys=self._config.server.api_keys,
            tenants=tuple(
                KeyHolder(tenant=tenant.core(), api_keys=tenant.api_keys)
                for tenant in self._config.tenants
            ),
            tiers=tuple(tier.core() for tier in self._config.tiers),
            max_body_bytes=self._config.server.max_body_bytes,
        )
        return create_app(self.dispatcher, settings, self.dispatcher.counters)

    async def replicas_seen(self) -> int:
        """How many engine replicas this front can send requests to."""
        return self.dispatcher.replicas_seen()

    async def drain(self) -> int:
        """No new requests from now on; how many are still open."""
        return self.dispatcher.drain()
