"""One worker of a sharded replica, in a Ray actor: a process of its own that holds one slice.

Ray's calls load it, ask for its health and end it. Plans don't come by call (0.6 ms each) but over
a channel, to `run`, which stays inside the actor until the channel closes.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fabric.cluster.kv_ends import ObjectStore, OwnEnds
from fabric.core.engine.plan import KvExport
from fabric.core.shard import Place

if TYPE_CHECKING:
    from fabric.worker.links import GroupAddress
    from fabric.worker.member import MemberSettings
    from fabric.worker.memory import MemoryReport, PoolSizes, PoolWish
    from fabric.worker.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """Where a worker runs. `node`: equal for workers of one machine. `free_port`: of its host."""

    node: str
    host: str
    pid: int
    free_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNumbers:
    """Of the whole model. `context_limit` in tokens. `has_experts`: it is a mixture."""

    context_limit: int
    eos_token_ids: tuple[int, ...]
    has_experts: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceReport:
    """What came of loading one slice. `holds`: which, in words."""

    config: ModelNumbers
    holds: str
    description: str
    memory: MemoryReport


class WorkerActor:
    """The actor class. Its calls come from the replica alone."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._worker: Worker | None = None

    def whereabouts(self) -> Whereabouts:
        """Where it was put."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.create_server((host, 0)) as probe:
            free_port: int = probe.getsockname()[1]
        return Whereabouts(
            node=ray.get_runtime_context().get_node_id(),
            host=host,
            pid=os.getpid(),
            free_port=free_port,
        )

    def load(self, settings: MemberSettings, address: GroupAddress) -> SliceReport:
        """Meet the other workers and load this one's slice; all of them do so at once."""
        from fabric.worker.member import open_member

        worker = self._worker = open_member(self._place, address, settings)
        return SliceReport(
            config=ModelNumbers(
                context_limit=worker.config.context_limit,
                eos_token_ids=worker.config.eos_token_ids,
                has_experts=worker.config.mixture is not None,
            ),
            holds=worker.share.describe(),
            description=worker.description,
            memory=worker.memory(),
        )

    def pool_sizes(self, wish: PoolWish) -> PoolSizes:
        """What this worker has room for. Raises `ValueError`."""
        return self._loaded().pool_sizes(wish)

    def allocate(self, wish: PoolWish, sizes: PoolSizes) -> MemoryReport:
        """Make the pools, of the size that all workers have agreed on."""
        return self._loaded().allocate(
            num_blocks=sizes.num_blocks,
            num_host_blocks=sizes.num_host_blocks,
            block_size=wish.block_size,
            max_sequences=wish.max_sequences,
            context_limit=sizes.context_limit,
        )

    def expert_loads(self) -> tuple[int, ...]:
        """See `Worker.expert_loads`."""
        return self._loaded().expert_loads()

    def collect(self, export: KvExport) -> list[Any]:
        """See `kv_ends.KvEnds.depart`: this worker's part."""
        return OwnEnds(self._loaded().staging, ObjectStore()).depart(export)

    def drop(self, export: KvExport) -> None:
        """See `kv_ends.KvEnds.drop`."""
        self._loaded().staging.drop(export)

    def stage(self, slot: int, references: list[Any]) -> None:
        """See `kv_ends.KvEnds.arrive`: this worker's part."""
        for reference in references:
            OwnEnds(self._loaded().staging, ObjectStore()).arrive(reference, lambda _: slot)

    def discard(self, slot: int, count: int) -> None:
        """See `kv_ends.KvEnds.discard`."""
        self._loaded().staging.discard(slot, count)

    def run(self, address: str) -> None:
        """See `fabric.worker.member.run_plans`."""
        from fabric.worker.member import run_plans

        run_plans(self._loaded(), address)

    def _loaded(self) -> Worker:
        assert self._worker is not None, "load first"
        return self._worker
