"""Decode speed of a model over several workers against one worker with all threads.

    python -m fabric.worker.benchmark [--tp 2] [--pp 1] [--batch 8] [--context 256] [--model FOLDER]

Every worker is a process with one thread; the one it is compared with has as many threads as they
are. The two take turns, so that what else the machine does strikes both. With `--pp`, as many
micro-batches of `--batch` / pp sequences are under way as there are stages; what sampling and the
way back of a token cost is not in it (`fabric bench engine` measures a whole engine).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from fabric.core.shard import Place, ShardSpec
from fabric.kernels.device import allocate_pool
from fabric.kernels.program import KvPool, StepBatch
from fabric.model.source import resolve_model
from fabric.worker.links import GroupAddress, open_links
from fabric.worker.runner import KernelBuild, Runner

PAGE = 16
ROUNDS = 5
STEPS = 20  # of a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`sequences` that decode at position `context`, in `parts` steps that follow each other."""

    folder: Path
    sequences: int
    context: int
    parts: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256, help="positions before a decode step")
    parser.add_argument("--model", help="a folder (default: the demo model)")
    options = parser.parse_args(arguments)
    spec = ShardSpec(tp=options.tp, pp=options.pp)
    load = Load(
        folder=resolve_model(options.model).path,
        sequences=options.batch,
        context=options.context,
        parts=spec.pp,
    )
    alone, spread = _compare(spec, load)
    print(f"{options.batch} sequences at context {options.context}, {spec.workers} threads in all")
    print(f"one worker       {options.batch / alone:8.1f} tok/s")
    print(f"tp {spec.tp} x pp {spec.pp}      {options.batch / spread:8.1f} tok/s")
    print(f"ratio            {alone / spread:8.2f}")


def _compare(spec: ShardSpec, load: Load) -> tuple[float, float]:
    """Seconds in which every sequence gets a token: one worker's, the group's. Medians."""
    address = GroupAddress(
        name=f"fabric-benchmark-{os.getpid()}",
        nodes=("here",) * spec.workers,
        hosts=("127.0.0.1",) * spec.workers,
    )
    context = multiprocessing.get_context("spawn")
    ends = []
    for worker in range(spec.workers):
        mine, theirs = context.Pipe()
        place = Place.of(spec, worker)
        context.Process(target=_member, args=(theirs, place, address, load), daemon=True).start()
        ends.append(mine)
    alone = Runner(
        load.folder,
        dtype="bfloat16",
        device=torch.device("cpu"),
        context_limit=None,
        build=KernelBuild(threads=spec.workers),
    )
    whole = Rounds(alone, replace(load, parts=1))
    for end in ends:
        end.recv()  # it has loaded
    alone_s, spread_s = [], []
    for _ in range(ROUNDS):
        alone_s.append(whole.run())
        for end in ends:
            end.send(True)
        spread_s.append(max(end.recv() for end in ends))
    for end in ends:
        end.send(False)
    return statistics.median(alone_s), statistics.median(spread_s)


def _member(end: Connection, place: Place, address: GroupAddress, load: Load) -> None:
    runner = Runner(
        load.folder,
        dtype="bfloat16",
        device=torch.device("cpu"),
        context_limit=None,
        build=KernelBuild(threads=1),
        links=open_links(place, address),
    )
    rounds = Rounds(runner, load)
    end.send(0.0)
    while end.recv():
        end.send(rounds.run())


class Rounds:
    """A loaded runner and its batches."""

    def __init__(self, runner: Runner, load: Load) -> None:
        self._runner = runner
        pages = load.context // PAGE + 1
        layout = runner.kv_layout(PAGE)
        blocks = allocate_pool(load.sequences * pages, layout.block_bytes(), torch.device("cpu"))
        self._pool = KvPool(layout=layout, blocks_XB=blocks)
        self._batches = [
            _batch(range(part, load.sequences, load.parts), load, pages)
            for part in range(load.parts)
        ]

    def run(self) -> float:
        """Seconds a step of every sequence took."""
        began = time.perf_counter()
        for _ in range(STEPS):
            for batch in self._batches:
                self._runner.run(batch, self._pool)
        return (time.perf_counter() - began) / STEPS


def _batch(sequences: Sequence[int], load: Load, pages: int) -> StepBatch:
    count = len(sequences)
    tables_XB = torch.arange(load.sequences * pages, dtype=torch.int32).view(-1, pages)
    return StepBatch(
        token_ids_T=torch.arange(count, dtype=torch.int32) + 100,
        query_starts_S1=torch.arange(count + 1, dtype=torch.int32),
        first_positions_S=torch.full((count,), load.context, dtype=torch.int32),
        table_rows_S=torch.tensor(sequences, dtype=torch.int32),
        block_tables_XB=tables_XB,
        logit_rows_R=torch.arange(count, dtype=torch.int32),
    )


if __name__ == "__main__":
    main()
