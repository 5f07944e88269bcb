"""Workers of a group as they serve: greedy text of the demo model, memory, and a worker that dies.

Each rank executes the very plans that an engine made for one worker; with the same greedy tokens at
every step the text is the same.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from kit.local_engine import LocalEngine, ask
from kit.ranks import DIED, free_port, group_name, run_ranks
from kit.tiny_models import make_tiny_model

from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.shard import Place, ShardSpec
from fabric.kernels.collective import CollectiveError
from fabric.model.source import ModelFolder
from fabric.worker.links import GroupAddress, open_links
from fabric.worker.runner import KernelBuild
from fabric.worker.worker import Worker

POOLS = {
    "num_blocks": 64,
    "num_host_blocks": 16,
    "block_size": 16,
    "max_sequences": 8,
    "context_limit": 256,
}
Tokens = list[list[int | None]]


def address(spec: ShardSpec, timeout_s: float = 60) -> GroupAddress:
    return GroupAddress(
        name=group_name(),
        nodes=("here",) * spec.workers,
        hosts=("127.0.0.1",) * spec.workers,
        store_port=free_port(),
        timeout_s=timeout_s,
    )


def open_worker(rank: int, folder: Path, spec: ShardSpec, group: GroupAddress) -> Worker:
    links = open_links(Place.of(spec, rank), group)
    worker = Worker(folder, device="cpu", build=KernelBuild(threads=1), links=links)
    worker.allocate(**POOLS)
    return worker


def replay(
    rank: int, ranks: int, folder: Path, spec: ShardSpec, group: GroupAddress, plans: list[StepPlan]
) -> Tokens | None:
    worker = open_worker(rank, folder, spec, group)
    worker.warm_up()
    results = [worker.execute(plan) for plan in plans]
    worker.close()
    if worker.share.vocab_runs:  # tensor parallel: C++ must not touch the group any more
        worker.allocate(**POOLS)
        with pytest.raises(CollectiveError, match="closed"):
            worker.execute(plans[0])
    if not worker.is_sampler:
        assert results == [None] * len(plans)
        return None
    return [[sample.token for sample in result.samples] for result in results if result]


SPECS = [
    ShardSpec(tp=3),
    *(
        pytest.param(spec, marks=pytest.mark.nightly)
        for spec in (
            ShardSpec(tp=2),
            ShardSpec(pp=2),
            ShardSpec(pp=3),
            ShardSpec(tp=2, pp=2),
        )
    ),
]


class Recording:
    """A worker, and all its results."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self.results: list[StepResult] = []

    def execute(self, plan: StepPlan) -> StepResult:
        result = self._worker.execute(plan)
        assert result is not None
        self.results.append(result)
        return result


@pytest.mark.timeout(300)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_same_greedy_text(
    demo_model: ModelFolder, demo_worker: Worker, spec: ShardSpec
) -> None:
    requests = [ask(f"r{i}", [20 + 31 * (i + 1) * j for j in range(9 + 7 * i)]) for i in range(4)]
    engine = LocalEngine(demo_worker, **POOLS, prefix_cache=False, chunk_tokens=13)
    recording = Recording(demo_worker)
    engine.worker = recording  # type: ignore[assignment]
    engine.run(*requests)
    expected = [[sample.token for sample in result.samples] for result in recording.results]
    told = run_ranks(spec.workers, replay, demo_model.path, spec, address(spec), engine.plans)
    assert [tokens for tokens in told if tokens is not None] == [expected]
    assert len(expected) > 10


def die_in_the_middle(
    rank: int, ranks: int, folder: Path, spec: ShardSpec, group: GroupAddress, plans: list[StepPlan]
) -> tuple[str, float]:
    worker = open_worker(rank, folder, spec, group)
    worker.execute(plans[0])
    if rank == 1:
        os._exit(1)
    began = time.monotonic()
    try:
        for plan in plans[1:]:
            worker.execute(plan)
    except CollectiveError as error:
        return str(error), time.monotonic() - began
    return "it went on", 0.0


@pytest.mark.parametrize("spec", [ShardSpec(tp=3), ShardSpec(pp=2)], ids=str)
def test_a_worker_that_dies_ends_the_step_of_the_others(tmp_path: Path, spec: ShardSpec) -> None:
    folder = make_tiny_model(
        tmp_path / "model", num_attention_heads=6, num_key_value_heads=3, hidden_size=96
    )
    alone = Worker(folder, device="cpu")
    engine = LocalEngine(alone, **POOLS, prefix_cache=False)
    engine.run(ask("r", list(range(40))))
    told = run_ranks(spec.workers, die_in_the_middle, folder, spec, address(spec), engine.plans)
    assert told[1] == DIED
    for message, seconds in (each for each in told if each != DIED):
        assert "is gone" in message or "given up" in message, message
        assert seconds < 10  # the deadline is 60 s: it was noticed, not waited for


def peak_bytes(rank: int, ranks: int, folder: Path, spec: ShardSpec, group: GroupAddress) -> float:
    """The most memory that loading took beyond what was there before, over the slice's size. A
    small model first: the code that loads is there before, too."""
    build = KernelBuild(threads=1)
    small = make_tiny_model(folder.parent / f"small-{rank}")
    Worker(small, device="cpu", context_limit=256, build=build)
    links = open_links(Place.of(spec, rank), group)
    before = _kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    worker = Worker(folder, device="cpu", context_limit=256, build=build, links=links)
    return (_kib("VmHWM") - before) * 1024 / worker.memory().weight_bytes


@pytest.mark.nightly
def test_peak_memory_is_the_slice_and_a_tenth(tmp_path: Path) -> None:
    """Of a model of 600 MB in many small layers: what is there twice is one matrix at a time, and
    what the allocator keeps of such. Both halves come from one file, of which each maps the whole.
    """
    folder = make_tiny_model(
        tmp_path / "model",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=48,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
    )
    spec = ShardSpec(tp=2)
    for share in run_ranks(spec.workers, peak_bytes, folder, spec, address(spec)):
        assert 0.9 < share <= 1.1


def _kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise AssertionError(f"no {field}")
