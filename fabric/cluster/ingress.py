"""One HTTP front process: the gateway's app and the dispatcher behind it. No torch in here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
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

# A front that takes over from another one has heard of a replica before; one of a new application
# answers with a 503 after so long.
FIRST_REPLICA_TIMEOUT_S = 30.0
POLL_S = 0.1


class Ingress:
    """The deployment class; `serve.ingress` puts its ASGI app behind a port of its own."""

    def __init__(
        self,
        engines: Mapping[str, DeploymentHandle],
        config: FabricConfig,
        model: ServedModel,
        run: Run,
    ) -> None:
        bind_replica_server_to_loopback()
        self._config = config
        self._waits = run.on_cluster
        identity = serve.get_replica_context().replica_id.unique_id
        run.logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        log_to(run.logs / f"requests-{identity}.jsonl")
        scaling = config.autoscaling
        cold_starts = scaling is not None and not scaling.min_replicas
        self.dispatcher = Dispatcher(
            EngineCalls(
                tuple(engines.values()),
                identity,
                run.sockets,
                cold_starts=cold_starts,
                scaled=config.scaled_pools,
            ),
            identity=identity,
            model=model,
            policy=Policy(
                admission=admission_of(config),
                router=router_of(config),
                dispatchers=config.server.ingress_replicas,
                objective=config.slo.objective,
                degrade=config.slo.degrade(),
                pairing=config.pools.core() if config.pools else None,
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

    async def check_health(self) -> None:
        """Asked by Serve, first of all before it sends clients here. In a rolling update the front
        before is stopped after that: so this one hears of a replica first."""
        if self._waits:
            self._waits = False
            deadline = time.monotonic() + FIRST_REPLICA_TIMEOUT_S
            while not self.dispatcher.replicas_seen():
                if time.monotonic() > deadline:
                    return
                await asyncio.sleep(POLL_S)

    async def status(self) -> dict[str, object]:
        """What `fabric status --address` shows."""
        return await self.dispatcher.fleet_status()

    async def replicas_seen(self) -> int:
        """How many engine replicas this front can send requests to."""
        return self.dispatcher.replicas_seen()

    async def drain(self) -> int:
        """No new requests from now on; how many are still open."""
        return self.dispatcher.drain()
