"""From a model folder to an engine that has generated a token: all before a replica is ready."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fabric.cluster.bundles import Bundles
from fabric.cluster.journal import recorder_of
from fabric.cluster.kv_ends import KvEnds, ObjectStore, OwnEnds
from fabric.cluster.loans import Lending
from fabric.cluster.workers import Executes, InProcess
from fabric.config import FabricConfig
from fabric.config.parts import engine_of
from fabric.core.configs import EngineConfig, PreemptionCosts, StepCosts
from fabric.core.engine.engine import Engine
from fabric.core.errors import ConfigError
from fabric.core.journal import Recorder, watched

if TYPE_CHECKING:
    from fabric.worker.memory import MemoryReport, PoolSizes, PoolWish
    from fabric.worker.warm_up import WarmUpTimes
    from fabric.worker.worker import Worker


NS_PER_S = 1_000_000_000


class Numbers(Protocol):
    """What an engine must know of a model; part of a worker's `DecoderConfig`."""

    @property
    def context_limit(self) -> int:
        """The longest sequence, tokens."""
        ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """What ends a generation."""
        ...


class Loaded(Protocol):
    """Weights that lie ready: a worker's, or those of a group. The verbs are `Worker`'s."""

    @property
    def config(self) -> Numbers:
        """The model's own numbers."""
        ...

    @property
    def description(self) -> str:
        """Which code runs, for the log."""
        ...

    def pool_sizes(self, wish: PoolWish) -> PoolSizes:
        """What `wish` gets in the memory that is free. Raises `ValueError`."""
        ...

    def allocate(
        self,
        *,
        num_blocks: int,
        num_host_blocks: int,
        block_size: int,
        max_sequences: int,
        context_limit: int,
    ) -> MemoryReport:
        """Make the pools."""
        ...

    def memory(self) -> MemoryReport:
        """Resident bytes, of all workers together."""
        ...

    def warm_up(self) -> WarmUpTimes:
        """The first steps, timed."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EngineParts:
    """A loaded engine. `executor`: which code runs the model, in words. Lengths in tokens."""

    engine: Engine
    workers: Executes
    executor: str
    context_limit: int
    weight_bytes: int
    kv_pool_bytes: int
    host_pool_bytes: int
    step_deadline_s: float = 30.0
    kv_ends: KvEnds | None = None  # where KV goes to others or comes from them
    lending: Lending | None = None  # where replicas lend each other prefixes
    journal: Recorder | None = None

    def stop(self) -> None:
        """End what the engine had for itself: workers, and the journal's writer."""
        self.workers.stop()
        if self.journal is not None:
            self.journal.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Makes the parts of an `EngineReplica` inside of a Serve replica. `threads`: of the CPU, for
    each worker; `cache`: fabric's cache folder. One worker lives in this process, several have
    their own. `hands_over`: KV goes to, or comes from, other replicas."""

    config: FabricConfig
    folder: str
    bundles: Bundles
    threads: int
    cache: Path
    hands_over: bool = False

    def __call__(self) -> tuple[str, EngineParts]:
        """The replica's id and its engine; the terminal sees how it goes."""
        from ray import serve  # here, because `fabric.driver` loads engines without Ray

        from fabric.cluster.progress import Progress
        from fabric.cluster.serve_policies import bind_replica_server_to_loopback

        bind_replica_server_to_loopback()
        replica_id: str = serve.get_replica_context().replica_id.unique_id
        progress = Progress(replica_id)
        with progress.reporting_errors():
            if self.bundles.spec.workers > 1:
                return replica_id, self._watched(replica_id, self._load_group(progress.say))
            worker = load_worker(
                self.config,
                folder=Path(self.folder),
                threads=self.threads,
                cache=self.cache,
                say=progress.say,
            )
            parts = load_engine(self.config, worker, InProcess(worker.execute), progress.say)
            if self.hands_over:
                parts = replace(parts, kv_ends=OwnEnds(worker.staging, ObjectStore()))
        return replica_id, self._watched(replica_id, parts)

    def _watched(self, replica_id: str, parts: EngineParts) -> EngineParts:
        recorder = recorder_of(self.config.journal, "engine", replica_id)
        engine = watched(recorder, "engine", parts.engine)
        return replace(parts, engine=engine, journal=recorder)

    def _load_group(self, say: Callable[[str], None]) -> EngineParts:
        from fabric.cluster.worker_group import WorkerGroup
        from fabric.worker.member import MemberSettings

        began = time.monotonic()
        group = WorkerGroup(self.bundles)
        group.load(
            MemberSettings(
                folder=Path(self.folder),
                cache_folder=self.cache / "kernels",
                dtype=self.config.model.dtype,
                device=self.config.model.device,
                threads=self.threads,
                context_limit=self.config.model.context_limit,
            )
        )
        slices = ", ".join(_mib(one.weight_bytes) for one in group.memories)
        say(f"weights: {slices}; {group.description} ({time.monotonic() - began:.1f} s)")
        parts = load_engine(self.config, group, group, say)
        return replace(parts, kv_ends=group.kv_ends()) if self.hands_over else parts


def load_worker(
    config: FabricConfig,
    *,
    folder: Path,
    threads: int | None,
    cache: Path | None,
    say: Callable[[str], None],
) -> Worker:
    """Load all weights in this process. `threads` None: all cores. `cache` None: ~/.cache/fabric.

    Raises `ModelError` and `ConfigError`, whose texts are for the operator.
    """
    # Here, because the launcher imports this module too and can do without torch's 150 MB.
    from fabric.worker.runner import KernelBuild
    from fabric.worker.worker import Worker

    began = time.monotonic()
    worker = Worker(
        folder,
        dtype=config.model.dtype,
        device=config.model.device,
        context_limit=config.model.context_limit,
        build=KernelBuild(
            cache_folder=cache / "kernels" if cache else None,
            progress=say,
            threads=threads,
            rounding=config.model.quantization,
        ),
    )
    say(
        f"weights: {_mib(worker.memory().weight_bytes)}, position tables: "
        f"{_mib(worker.memory().rope_bytes)}, {worker.description} "
        f"({time.monotonic() - began:.1f} s)"
    )
    return worker


def load_engine(
    config: FabricConfig, loaded: Loaded, workers: Executes, say: Callable[[str], None]
) -> EngineParts:
    """Make the pools, run first steps. `say` gets a line for each thing done. Knows nothing of Ray:
    `fabric.driver` loads its engine here too. Raises `ConfigError`."""
    wish = _pool_wish(config, loaded.config.context_limit)
    try:
        sizes = loaded.pool_sizes(wish)
    except ValueError as error:
        raise ConfigError(f"kv.device_bytes: {error}") from None
    memory = loaded.allocate(
        num_blocks=sizes.num_blocks,
        num_host_blocks=sizes.num_host_blocks,
        block_size=wish.block_size,
        max_sequences=wish.max_sequences,
        context_limit=sizes.context_limit,
    )
    say(
        f"KV pool: {_mib(memory.kv_pool_bytes)} in {sizes.num_blocks} blocks of {wish.block_size} "
        f"tokens, host pool: {_mib(memory.host_pool_bytes)}, context: {sizes.context_limit} tokens"
    )
    times = loaded.warm_up()
    say(_costs_line(_preemption_costs(times)))
    token_bytes = memory.kv_pool_bytes // (sizes.num_blocks * wish.block_size)
    known = _engine_config(config, sizes, loaded, times)
    engine = Engine(replace(known, kv_token_bytes=token_bytes))
    return EngineParts(
        engine=engine,
        workers=workers,
        executor=loaded.description,
        context_limit=sizes.context_limit,
        weight_bytes=memory.weight_bytes,
        kv_pool_bytes=memory.kv_pool_bytes,
        host_pool_bytes=memory.host_pool_bytes,
        step_deadline_s=config.engine.step_deadline_s,
        lending=_lending(config, engine.config),
    )


def _lending(config: FabricConfig, engine: EngineConfig) -> Lending | None:
    section = config.kv.prefix_fetch
    if section is None:
        return None
    return Lending(
        store_bytes=section.store_bytes,
        block_size=engine.block_size,
        kv_token_bytes=engine.kv_token_bytes,
    )


def _pool_wish(config: FabricConfig, context_limit: int) -> PoolWish:
    from fabric.worker.memory import PoolWish

    return PoolWish(
        block_size=config.kv.block_size,
        max_sequences=config.engine.max_sequences,
        context_limit=min(context_limit, config.model.context_limit or context_limit),
        device_bytes=config.kv.device_bytes,
        host_bytes=config.kv.host_bytes,
    )


def _engine_config(
    config: FabricConfig, sizes: PoolSizes, loaded: Loaded, times: WarmUpTimes
) -> EngineConfig:
    known = EngineConfig(
        num_blocks=sizes.num_blocks,
        num_host_blocks=sizes.num_host_blocks,
        context_limit=sizes.context_limit,
        eos_token_ids=loaded.config.eos_token_ids,
        preemption=_preemption_costs(times),
        costs=_step_costs(times),
    )
    return engine_of(config, known)


def _preemption_costs(times: WarmUpTimes) -> PreemptionCosts:
    return PreemptionCosts(
        swap_ns_per_block=times.swap_ns_per_block,
        recompute_ns_per_token=times.prefill_ns_per_token,
    )


def _step_costs(times: WarmUpTimes) -> StepCosts:
    """A first guess at five costs from two times; the engine learns the rest. What a token takes
    bounds what a row does, and a step of one row is mostly what every step takes."""
    token_ns = times.prefill_ns_per_token
    return StepCosts(
        step_ns=max(times.decode_ns - token_ns, token_ns),
        token_ns=token_ns,
        decode_ns=token_ns,
        context_ns=token_ns / 1_000,
        pair_ns=token_ns / 20_000,
    )


def _costs_line(costs: PreemptionCosts) -> str:
    recompute = f"{costs.recompute_ns_per_token / 1e3:,.0f} µs a token"
    swap = f"{costs.swap_ns_per_block / 1e3:,.0f} µs a block"
    return f"preemption: recompute {recompute}, swap {swap if costs.swap_ns_per_block else 'off'}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
