"""`Links`: a worker's ends of the groups that its replica's workers form, and how they are opened.

    stage       the tp x ep workers of one pipeline stage: they run every step together
    upstream    the worker of the stage before with the same ranks; hidden states come from there
    downstream  the one of the stage behind

What carries a group follows from where its workers are: on one machine shared memory, else gloo;
between GPUs NCCL, once there is one to run it on.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from fabric.core.shard import Place
from fabric.kernels.collective import Collective, CollectiveError
from fabric.kernels.cpu.build import BuildError
from fabric.kernels.cpu.shared_memory import SharedMemoryCollective
from fabric.kernels.process_group import ProcessGroupCollective


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAddress:
    """Where a replica's workers are, in the order of their numbers.

    `name`: one that no other group has had, not even an earlier life of this replica. `nodes`:
    equal strings mean the same machine (and the same /dev/shm). `hosts`: IP addresses by which the
    others reach them. `store_port`: a free port of worker 0's host, where workers on different
    machines find each other; not needed on one. `timeout_s`: the longest wait for a peer.
    """

    name: str
    nodes: tuple[str, ...]
    hosts: tuple[str, ...]
    store_port: int | None = None
    timeout_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """One worker's place and its ends of the groups; None where there is nobody to talk to."""

    place: Place
    stage: Collective | None = None
    upstream: Collective | None = None
    downstream: Collective | None = None

    @property
    def is_sampler(self) -> bool:
        """Does this worker draw the tokens? The first one of the last stage does."""
        place = self.place
        return place.is_last_stage and place.tp_rank == 0 and place.ep_rank == 0

    def close(self) -> None:
        """Leave every group; whoever waits for this worker then stops waiting."""
        for group in (self.stage, self.upstream, self.downstream):
            if group is not None:
                group.close()


def open_links(
    place: Place, address: GroupAddress, *, device: str = "cpu", cache_folder: Path | None = None
) -> Links:
    """Meet the others; returns when all of this worker's neighbours have come, or raises
    `CollectiveError` after `address.timeout_s`. `device`: "cpu" or "cuda"."""
    spec = place.spec
    if len(address.nodes) != spec.workers or len(address.hosts) != spec.workers:
        raise ValueError(f"{spec.workers} workers need as many nodes and hosts")
    store: Store | None = None
    if device == "cuda" or len(set(address.nodes)) > 1:
        store = _store(place, address)
    per_stage = spec.tp * spec.ep

    def meet(what: str, workers: list[int]) -> Collective | None:
        """The group of `workers`, this one among them. All meet their groups in one order."""
        if len(workers) == 1:
            return None
        return _open(
            _Meeting(
                name=f"{address.name}-{what}",
                workers=workers,
                rank=workers.index(place.worker),
                device=device,
                store=store,
            ),
            address,
            cache_folder,
        )

    first = place.pp_rank * per_stage
    return Links(
        place=place,
        stage=meet(f"stage{place.pp_rank}", list(range(first, first + per_stage))),
        upstream=None
        if place.is_first_stage
        else meet(f"pipe{place.worker}", [place.worker - per_stage, place.worker]),
        downstream=None
        if place.is_last_stage
        else meet(f"pipe{place.worker + per_stage}", [place.worker, place.worker + per_stage]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Meeting:
    name: str
    workers: list[int]
    rank: int
    device: str
    store: Store | None


def _open(meeting: _Meeting, address: GroupAddress, cache_folder: Path | None) -> Collective:
    size, timeout_s = len(meeting.workers), address.timeout_s
    name, rank, store = meeting.name, meeting.rank, meeting.store
    if meeting.device == "cuda":
        assert store is not None
        return ProcessGroupCollective.nccl(store, name, rank, size, timeout_s=timeout_s)
    if len({address.nodes[worker] for worker in meeting.workers}) == 1:
        try:
            return SharedMemoryCollective(
                name, rank, size, timeout_s=timeout_s, cache_folder=cache_folder
            )
        except BuildError as error:
            raise CollectiveError(f"{name}: workers on one machine need C++: {error}") from None
    assert store is not None
    host = address.hosts[meeting.workers[rank]]
    return ProcessGroupCollective.gloo(store, name, rank, size, host=host, timeout_s=timeout_s)


def _store(place: Place, address: GroupAddress) -> Store:
    if address.store_port is None:
        raise ValueError("workers on several machines or GPUs need a store_port")
    listening = None
    if place.worker == 0:
        # Bound by us: left to itself, the store would listen on every interface.
        listening = socket.create_server((address.hosts[0], address.store_port)).detach()
    try:
        return TCPStore(
            address.hosts[0],
            address.store_port,
            is_master=place.worker == 0,
            timeout=timedelta(seconds=address.timeout_s),
            wait_for_workers=False,
            master_listen_fd=listening,
        )
    except RuntimeError as error:
        raise CollectiveError(f"{address.name}: no store on {address.hosts[0]}: {error}") from None
