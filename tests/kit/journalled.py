"""Machines of the kit, driven as ever, with a journal attached that is replayed at the end."""

from __future__ import annotations

import marshal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from types import ModuleType
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine
from kit.scripted_worker import ScriptedWorker

from fabric.core.configs import EngineConfig
from fabric.core.engine.engine import Engine
from fabric.core.journal import Begin, Event, Recorder, State
from fabric.core.packing import Packer
from fabric.core.replay import Difference, Replay, verb_of
from fabric.core.request import Request, SamplingParams
from fabric.journal.format import resolve

AGAIN = 23  # events between two beginnings


class Memory:
    """A `Sink` that keeps everything, and wants a new beginning again and again."""

    def __init__(self) -> None:
        self.entries: list[Event | State | Begin] = []
        self.fresh = False

    def put(self, entry: Event | State | Begin) -> None:
        self.entries.append(entry)
        if isinstance(entry, Event) and len(self.entries) % AGAIN == 0:
            self.fresh = True

    def close(self) -> None:
        """Nothing was kept open."""


@dataclass(frozen=True, slots=True)
class Watching:
    """What was made while it was watched: the constructor of one kind of machine."""

    kind: type
    hide: bool
    memories: list[Memory]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        memory = Memory()
        self.memories.append(memory)
        name = self.kind.__name__.lower()
        return Recorder(memory, hide=self.hide).watch(name, self.kind(*arguments, **named))


@contextmanager
def watched(module: ModuleType, kind: type, *, hide: bool) -> Iterator[list[Memory]]:
    """Whatever `module` makes of this kind is watched meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        watching = Watching(kind, hide, [])
        patch.setattr(module, kind.__name__, watching)
        yield watching.memories


def difference(memory: Memory, *, hide: bool) -> Difference | None:
    """The first one of a replay, by way of bytes as in a file."""
    packer, replay = Packer(hide=hide), Replay(resolve, hide=hide)
    for entry in memory.entries:
        found = None
        if isinstance(entry, State):
            data = marshal.loads(marshal.dumps(entry.data))
            found = replay.state(entry.machine, data, continued=True)
        elif isinstance(entry, Event):
            verb = verb_of(entry, packer)
            marshal.dumps([verb.arguments, verb.named, verb.outcome, verb.noted, verb.stops])
            found = replay.event(verb)
        if found is not None:
            return found
    return None


def replayed(machine: type[RuleBasedStateMachine], memories: list[Memory], *, hide: bool) -> type:
    """The machine, with a replay of all that it made at the end of each example."""

    class Replayed(machine):  # type: ignore[misc, valid-type]
        def teardown(self) -> None:
            super().teardown()
            for memory in memories:
                assert difference(memory, hide=hide) is None
            memories.clear()

    return Replayed


CROWDED = EngineConfig(
    block_size=4,
    num_blocks=16,
    num_host_blocks=8,
    max_sequences=8,
    step_tokens=24,
    chunk_tokens=8,
    context_limit=64,
    eos_token_ids=(0,),
)
MS = 1_000_000


def busy_engine(recorder: Recorder, steps: int, first_token: int = 1) -> Engine:
    """An engine with too little room, watched from its first request on: preemptions, aborts,
    forks. Prompts are of tokens from `first_token` on."""
    dice, now = Random(7), 0
    engine = recorder.watch("engine", Engine(CROWDED))
    worker = ScriptedWorker(CROWDED, vocab=12)
    for step in range(steps):
        now += MS
        if dice.random() < 0.8:
            prompt = [first_token] * dice.randint(1, 12) + [first_token + dice.randint(0, 3)]
            sampling = SamplingParams(
                max_tokens=dice.randint(1, 24), n=dice.choice([1, 1, 2]), seed=dice.randint(0, 9)
            )
            request = Request(
                request_id=f"r{step}",
                prompt=tuple(prompt),
                sampling=sampling,
                arrival=now,
                tier=dice.choice(["interactive", "standard", "batch"]),
            )
            engine.add(request, now)
        if dice.random() < 0.1:
            engine.abort(f"r{step - 3}")
        plan = engine.schedule(now)
        if plan is not None:
            now += (8 + len(plan.steps)) * MS
            engine.commit(plan, worker.execute(plan), now)
    return engine
