"""`run_ranks`: one function in several real processes, each a rank; what they return comes back."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

DEADLINE_S = 120.0
DIED = "died"
# Seconds to import: once, in a process that does nothing else and of which each rank is a copy.
PRELOADED = ["torch", "torch.distributed", "fabric.worker.links", "fabric.worker.worker"]


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(rank, ranks, *arguments)` in `ranks` fresh processes. One that ends without a
    result gives `DIED`. An exception in any fails the test with its traceback."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    ends, processes = [], []
    for rank in range(ranks):
        mine, theirs = context.Pipe()
        process = context.Process(
            target=_main, args=(theirs, function, rank, ranks, arguments), daemon=True
        )
        process.start()
        theirs.close()
        ends.append(mine)
        processes.append(process)
    results = [_result(end) for end in ends]
    for process in processes:
        process.join(DEADLINE_S)
    failures = [text for kind, text in results if kind == "failed"]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def group_name() -> str:
    """A name that no other test's group has."""
    return f"fabric-test-{os.getpid()}-{os.urandom(4).hex()}"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _result(end: Connection) -> tuple[str, Any]:
    assert end.poll(DEADLINE_S), "a rank is stuck"
    try:
        kind, value = end.recv()
    except EOFError:
        return "result", DIED
    return kind, value


def _main(
    end: Connection, function: Callable[..., Any], rank: int, ranks: int, arguments: tuple[Any, ...]
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        end.send(("result", function(rank, ranks, *arguments)))
    except Exception:  # noqa: BLE001 - the test process shows it
        end.send(("failed", f"rank {rank}: {traceback.format_exc()}"))
