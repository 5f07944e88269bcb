"""The engine's loop over a pipeline: plans under way, results in order, the end of a lost group."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kit.local_replica import alone, engine_config, request
from kit.scripted_worker import ScriptedWorker

from fabric.cluster.engine_loop import Command, EngineLoop, Step
from fabric.cluster.reports import ShardReport
from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.errors import Unavailable
from fabric.core.request import TokenChunk


class Pipeline:
    """A scripted worker behind `Executes`: a plan runs when it is submitted, as on a first stage.

    `deepest`: the most plans that were under way. `gate`: no result comes before it is set.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.plans_max = config.micro_batches
        self.deepest = 0
        self.lost = False
        self.gate = threading.Event()
        self.gate.set()
        self._worker = ScriptedWorker(config)
        self._results: deque[StepResult] = deque()

    def submit(self, plan: StepPlan) -> None:
        self._results.append(self._worker.execute(plan))
        self.deepest = max(self.deepest, len(self._results))
        assert len(self._results) <= self.plans_max

    def receive(self, deadline_s: float) -> StepResult:
        self.deadline_s = deadline_s
        assert self.gate.wait(30)
        if self.lost:
            raise Unavailable("worker 1 is gone")
        return self._results.popleft()

    def problem(self) -> str | None:
        return None

    def shards(self) -> tuple[ShardReport, ...]:
        return ()

    def stop(self) -> None:
        pass


class Driven:
    """A loop, and what it delivers."""

    def __init__(self, stages: int) -> None:
        self.config = engine_config(micro_batches=stages)
        self.engine = Engine(self.config)
        self.pipeline = Pipeline(self.config)
        self.steps: queue.Queue[Step] = queue.Queue()
        self.loop = EngineLoop("r", self.engine, self.pipeline, self.steps.put)

    def until_finished(self, names: set[str]) -> list[TokenChunk]:
        """All chunks until each of these requests has ended."""
        chunks: list[TokenChunk] = []
        left = set(names)
        while left:
            step = self.steps.get(timeout=30)
            assert step.error is None
            chunks += step.chunks
            left -= {chunk.request_id for chunk in step.chunks if chunk.finish is not None}
        return chunks


@contextmanager
def driven(stages: int) -> Iterator[Driven]:
    one = Driven(stages)
    one.loop.start()
    try:
        yield one
    finally:
        one.pipeline.gate.set()
        one.loop.stop()
        one.engine.check()


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_pipeline_is_kept_full_and_gives_the_tokens_of_a_single_worker(stages: int) -> None:
    requests = [request(f"q{number}", prompt=9, max_tokens=30) for number in range(6)]
    with driven(stages) as one:
        for each in requests:
            one.loop.submit(Command(request=each))
        chunks = one.until_finished({each.request_id for each in requests})
        assert one.pipeline.deepest == stages
    for each in requests:
        mine = [chunk for chunk in chunks if chunk.request_id == each.request_id]
        assert [chunk.position for chunk in mine] == list(range(30))
        assert [token for chunk in mine for token in chunk.tokens] == alone(each)[0]


def test_one_sequence_alone_does_not_wait_for_a_full_pipeline() -> None:
    with driven(3) as one:
        one.loop.submit(Command(request=request("q", max_tokens=5)))
        assert len(one.until_finished({"q"})) == 5
        assert one.pipeline.deepest == 1


def test_the_last_sequence_aborted_in_flight_leaves_nothing_under_way() -> None:
    with driven(2) as one:
        one.pipeline.gate.clear()
        for name in ("a", "b"):
            one.loop.submit(Command(request=request(name, max_tokens=50)))
        while one.pipeline.deepest < 2:
            time.sleep(0.001)
        for name in ("a", "b"):
            one.loop.submit(Command(abort=name))
        one.pipeline.gate.set()
        one.until_finished({"a", "b"})
        one.loop.submit(Command(request=request("c", max_tokens=3)))
        one.until_finished({"c"})
        snapshot = one.loop.snapshot
        assert snapshot.blocks_free == snapshot.blocks_total


def test_a_lost_worker_ends_the_loop_with_its_reason() -> None:
    with driven(2) as one:
        one.pipeline.lost = True
        one.loop.submit(Command(request=request("q", max_tokens=50)))
        while (step := one.steps.get(timeout=30)).error is None:
            pass
        assert step.error == one.loop.error == "Unavailable: worker 1 is gone"
        assert one.loop.stuck_s() == float("inf")
