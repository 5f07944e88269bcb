"""A stretch of decode steps at once leaves an engine as single steps would, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.journalled import Memory, difference
from kit.planting import constant, planted

from fabric.core.configs import EngineConfig
from fabric.core.engine import forward as forward_module
from fabric.core.engine.engine import Engine
from fabric.core.engine.forward import steady_steps, steady_until
from fabric.core.engine.plan import Sample, StepPlan, StepResult
from fabric.core.freeze import Freezer
from fabric.core.journal import Recorder
from fabric.core.request import Request, SamplingParams

MS = 1_000_000
STOP = 0
CONFIG = EngineConfig(
    block_size=4,
    num_blocks=40,
    num_host_blocks=10,
    max_sequences=6,
    step_tokens=32,
    chunk_tokens=8,
    context_limit=100,
    eos_token_ids=(STOP,),
    patience_ns=800 * MS,
)


class World:
    """One history of requests and steps; what a token is and how long a step takes hangs on where
    it is. `stretches`: as many steps at once as can be, at most so many."""

    def __init__(self, seed: int, config: EngineConfig, stretches: int) -> None:
        self.dice = Random(seed)
        self.memory = Memory()
        self.config = config
        self.engine: Engine = Recorder(self.memory).watch("engine", Engine(config))
        self.now = 0
        self.stretches = stretches
        self.steps = self.at_once = 0
        self.said: dict[tuple[str, int], list[int]] = {}

    def run(self, arrivals: int) -> None:
        """Requests come at steps that the dice name, whatever goes between."""
        for number in range(arrivals):
            until = self.steps + self.dice.choice([0, 1, 3, 8, 20, 60])
            while self.steps < until and self.engine.has_work:
                self.step(until - self.steps)
            self.arrive(number)
        while self.engine.has_work:
            self.step(1000)
        self.engine.check()

    def arrive(self, number: int) -> None:
        dice = self.dice
        sampling = SamplingParams(
            max_tokens=dice.choice([5, 30, 60]), n=dice.choice([1, 1, 1, 2]), seed=number
        )
        prompt = (1,) * dice.choice([3, 8, 11]) + (dice.choice([2, 3]),)
        self.engine.add(
            Request(
                request_id=f"r{number}",
                prompt=prompt,
                sampling=sampling,
                arrival=self.now,
                tier=dice.choice(["standard", "standard", "batch"]),
            ),
            self.now,
        )

    def step(self, most: int) -> None:
        """One, or a stretch."""
        count = steady_steps(self.engine, min(most, self.stretches)) if self.stretches else 0
        running = list(self.engine._scheduler.running.items)
        ends, now = [], self.now
        while len(ends) < count and now < steady_until(self.engine):
            now += self.took(len(running), self.steps + len(ends))
            ends.append(now)
        tokens = [
            tuple(token(one.number, len(one.tokens) + index) for index in range(len(ends)))
            for one in running
        ]
        first_stop = min((mine.index(STOP) for mine in tokens if STOP in mine), default=len(ends))
        ends = ends[:first_stop]
        if not ends:
            self.single()
            return
        for chunk in self.engine.forward(self.now, ends, [mine[: len(ends)] for mine in tokens]):
            self.said.setdefault((chunk.request_id, chunk.choice), []).extend(chunk.tokens)
        self.now = ends[-1]
        self.steps += len(ends)
        self.at_once += len(ends)

    def single(self) -> None:
        plan = self.engine.schedule(self.now)
        if plan is None:
            self.now += 10 * MS
            return
        self.now += self.took(len(plan.steps), self.steps)
        self.steps += 1
        for chunk in self.engine.commit(plan, self.result(plan), self.now):
            self.said.setdefault((chunk.request_id, chunk.choice), []).extend(chunk.tokens)

    def result(self, plan: StepPlan) -> StepResult:
        samples = [
            Sample(token=token(one.sequence, one.start + one.count) if one.samples else None)
            for one in plan.steps
        ]
        return StepResult(plan_id=plan.plan_id, samples=tuple(samples))

    def took(self, rows: int, step: int) -> int:
        return (8 + rows) * MS + step * 7919 % 1_000_003


def token(sequence: int, length: int) -> int:
    """Of a history of so many tokens, the next one; one of 40 is a stop token."""
    return (sequence * 7 + length * 13 + length * length) % 40


@given(
    seed=st.integers(0, 10_000),
    blocks=st.sampled_from([26, 40, 200]),
    cache=st.booleans(),
    stretches=st.sampled_from([2, 7, 50]),
)
@settings(max_examples=8, deadline=None)
def test_a_stretch_is_its_steps(seed: int, blocks: int, cache: bool, stretches: int) -> None:
    config = replace(CONFIG, num_blocks=blocks, prefix_cache=cache)
    single, fast = World(seed, config, 0), World(seed, config, stretches)
    single.run(8)
    fast.run(8)
    assert fast.said == single.said
    assert (fast.now, fast.steps) == (single.now, single.steps)
    assert state(fast) == state(single)
    assert difference(fast.memory, hide=True) is None


def state(world: World) -> object:
    engine = world.engine._machine  # type: ignore[attr-defined]
    return Freezer(hide=False).freeze(engine)


def test_most_steps_of_a_decoding_engine_are_at_once() -> None:
    world = World(3, replace(CONFIG, num_blocks=200, patience_ns=10**12), 50)
    world.run(8)
    assert world.at_once > world.steps / 2


@pytest.mark.parametrize("name", ["_blocks", "_learn"])
def test_a_stretch_that_forgets_something_is_seen(name: str) -> None:
    config = replace(CONFIG, num_blocks=200, patience_ns=10**12)
    single, fast = World(3, config, 0), World(3, config, 50)
    single.run(8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_module, name, constant(None)(print))
        with pytest.raises((AssertionError, IndexError)):
            fast.run(8)
            assert state(fast) == state(single)


def test_steps_that_differ_are_refused() -> None:
    world = World(1, CONFIG, 0)
    world.arrive(0)
    with pytest.raises(ValueError, match="not all alike"):
        world.engine.forward(0, [1], [(5,)])
    with planted(Engine, "check", constant(None)):
        before = state(world)
        with pytest.raises(ValueError, match="not all alike"):
            world.engine.forward(0, [1], [(5,)])
        assert state(world) == before
