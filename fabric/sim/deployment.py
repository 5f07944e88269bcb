"""A configuration of `fabric serve` as a simulation: what it says to each part of the core."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fabric.config import FabricConfig
from fabric.config.parts import admission_of, engine_of, router_of
from fabric.core.configs import DegradeConfig, EngineConfig
from fabric.core.errors import ConfigError
from fabric.core.journal import Recorder
from fabric.core.request import Request
from fabric.sim.costs import Profile
from fabric.sim.records import Outcome
from fabric.sim.simulation import Arrival, Plan, PrefillPool, Simulation
from fabric.sim.slo import SloControl


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A plan, and what its SLO promises."""

    name: str
    plan: Plan
    objective: float
    degrade: DegradeConfig

    def build(
        self, arrivals: Iterable[Request | Arrival], journal: Recorder | None = None
    ) -> Simulation:
        """A simulation with its ledger and its ladder; run it once."""
        simulation = Simulation(self.plan, arrivals)
        control = SloControl(simulation, self.plan.admission.tiers, self.degrade, self.objective)
        if journal is not None:
            simulation.watch(journal)
            control.watch(journal)
        return simulation

    def run(
        self, arrivals: Iterable[Request | Arrival], journal: Recorder | None = None
    ) -> Outcome:
        """Until the last request has ended; every machine is checked then."""
        simulation = self.build(arrivals, journal)
        outcome = simulation.run()
        simulation.check()
        return outcome


def deployment_of(config: FabricConfig, chosen: Profile, name: str = "") -> Deployment:
    """What would serve under this configuration, on a profile's hardware. Raises `ConfigError`."""
    scaling, pools = config.autoscaling, config.pools
    prefill = None
    if pools is not None:
        if pools.prefill.shard != pools.decode.shard:
            raise ConfigError("pools: one profile tells of both, so their shards must be alike")
        prefill = PrefillPool(
            replicas=pools.prefill.replicas,
            profile=_profile(config, chosen, pools.prefill.chunk_tokens),
            pairing=pools.core(),
        )
    plan = Plan(
        profile=_profile(config, chosen, pools.decode.chunk_tokens if pools else None),
        replicas=config.first_replicas if pools is None else pools.decode.replicas,
        prefill=prefill,
        dispatchers=config.server.ingress_replicas,
        admission=admission_of(config),
        router=router_of(config),
        autoscaler=None if scaling is None else scaling.core(),
    )
    return Deployment(
        name=name, plan=plan, objective=config.slo.objective, degrade=config.slo.degrade()
    )


def _profile(config: FabricConfig, chosen: Profile, chunk_tokens: int | None) -> Profile:
    """Of a pool: its chunks may be shorter."""
    engine = engine_on(config, chosen)
    if chunk_tokens is not None:
        engine = replace(engine, chunk_tokens=chunk_tokens)
    return replace(chosen, engine=engine)


def engine_on(config: FabricConfig, chosen: Profile) -> EngineConfig:
    """The engine under this configuration. The profile has its pools where the file says nothing;
    a model over pipeline stages is one whose steps the profile already tells as a whole."""
    known, size = chosen.engine, config.kv.block_size
    block_bytes = size * chosen.kv_bytes
    blocks = known.num_blocks * known.block_size // size
    host = known.num_host_blocks * known.block_size // size
    if block_bytes:
        host = config.kv.host_bytes // block_bytes
        if config.kv.device_bytes is not None:
            blocks = config.kv.device_bytes // block_bytes
    limit = known.context_limit
    if config.model.context_limit is not None:
        limit = min(limit, config.model.context_limit)
    known = replace(known, num_blocks=blocks, num_host_blocks=host, context_limit=limit)
    return replace(engine_of(config, known), micro_batches=1)
