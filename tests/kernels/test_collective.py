"""Groups of real processes: every operation against what it should give, and peers that die."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from kit.ranks import DIED, free_port, group_name, run_ranks

from fabric.kernels.collective import Collective, CollectiveError
from fabric.kernels.cpu.shared_memory import SharedMemoryCollective
from fabric.kernels.process_group import ProcessGroupCollective

RANKS = 3
KINDS = ["shared memory", "gloo"]


def open_group(kind: str, rank: int, ranks: int, name: str, port: int) -> Collective:
    if kind == "shared memory":  # outboxes so small that tensors go in pieces
        return SharedMemoryCollective(name, rank, ranks, outbox_bytes=4096, timeout_s=20)
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=rank == 0)
    return ProcessGroupCollective.gloo(store, name, rank, ranks, host="127.0.0.1", timeout_s=20)


def every_operation(rank: int, ranks: int, kind: str, name: str, port: int) -> None:
    group = open_group(kind, rank, ranks, name, port)
    assert (group.rank, group.size) == (rank, ranks)
    for length in (1, 5000):
        for other, found in enumerate(group.all_gather(torch.full((length,), float(rank)))):
            assert (found == other).all()
    assert all(found.numel() == 0 for found in group.all_gather(torch.empty(0)))

    noise = [torch.randn(700, generator=torch.Generator().manual_seed(r)) for r in range(ranks)]
    total = group.all_reduce(noise[rank].clone())
    assert torch.equal(total, noise[0] + noise[1] + noise[2])  # in this order, bit for bit

    rows = lambda source, to: (source * 7 + to * 3) % 5 * 100  # noqa: E731
    parts = [torch.full((rows(rank, to), 6), float(10 * rank + to)) for to in range(ranks)]
    for source, found in enumerate(group.all_to_all(parts)):
        assert found.shape == (rows(source, rank), 6)
        assert (found == 10 * source + rank).all()

    for count in range(5):  # more than may wait in between, and larger than an outbox
        sent = torch.arange(3000) * (count + 1)
        if rank == 0:
            group.send(sent, 1)
        elif rank == 1:
            assert torch.equal(group.receive(torch.zeros_like(sent), 0), sent)
    group.barrier()
    group.close()
    with pytest.raises(CollectiveError, match="closed"):
        group.barrier()


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation(kind: str) -> None:
    name = group_name()
    run_ranks(RANKS, every_operation, kind, name, free_port())
    assert not list(Path("/dev/shm").glob(f"{name}*"))


def lose_a_peer(rank: int, ranks: int, kind: str, name: str, port: int) -> tuple[str, float]:
    group = open_group(kind, rank, ranks, name, port)
    group.barrier()
    if rank == 1:
        os._exit(1)
    began = time.monotonic()
    try:
        group.all_gather(torch.zeros(10))
    except CollectiveError as error:
        return str(error), time.monotonic() - began
    return "it went on without rank 1", 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_peer_is_an_error_at_once(kind: str) -> None:
    """Long before the deadline of 20 s: the kernel tells of a process that ended."""
    told = run_ranks(RANKS, lose_a_peer, kind, group_name(), free_port())
    assert told[1] == DIED
    for message, seconds in (told[0], told[2]):
        assert "gone" in message or "given up" in message or "lost its group" in message, message
        assert seconds < 10


def wait_for_a_sleeper(rank: int, ranks: int, name: str) -> str:
    group = SharedMemoryCollective(name, rank, ranks, timeout_s=1.0)
    if rank == 1:
        time.sleep(3)
        return ""
    try:
        group.receive(torch.zeros(1), 1)
    except CollectiveError as error:
        return str(error)
    return "it was answered"


def test_a_silent_peer_is_an_error_after_the_deadline() -> None:
    assert "did not answer within 1000 ms" in run_ranks(2, wait_for_a_sleeper, group_name())[0]


def wait_and_count(rank: int, ranks: int, name: str) -> float:
    group = SharedMemoryCollective(name, rank, ranks, timeout_s=20)
    group.barrier()
    if rank == 1:
        time.sleep(2)
        group.send(torch.zeros(1), 0)
        return 0.0
    began = time.process_time()
    group.receive(torch.zeros(1), 1)
    return time.process_time() - began


def test_waiting_does_not_spin() -> None:
    """CPU time, not wall time: at most 2 % of the two seconds that the other one slept."""
    assert run_ranks(2, wait_and_count, group_name())[0] <= 0.04


def test_nobody_comes() -> None:
    with pytest.raises(CollectiveError, match="not all workers"):
        SharedMemoryCollective(group_name(), 0, 2, timeout_s=0.1)
    with pytest.raises(CollectiveError, match="rank 0 made no shared memory"):
        SharedMemoryCollective(group_name(), 1, 2, timeout_s=0.1)
