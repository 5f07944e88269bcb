"""`Replicas` with its `Link`s: heartbeats come, or don't, and the clock is turned by hand.

What must hold: who is sent to has answered of late, is well, and Serve knows it; what is forgotten
was silent for long; one heartbeat is under way at a time, whoever asks.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.clock import turned_by_hand
from kit.engine_loop import ask
from kit.hand_loop import HandLoop
from kit.reports import report_of
from kit.scripted_calls import ScriptedCalls

import fabric.cluster.link as link_module
import fabric.cluster.replicas as replicas_module
from fabric.cluster.replicas import LOST_S, SILENT_S, Replicas
from fabric.cluster.reports import encode_replica
from fabric.cluster.wire import encode_step
from fabric.core.snapshot import ReplicaSnapshot

NAMES = ("a", "b", "c")
which_one = st.sampled_from(NAMES)


class FleetCalls(ScriptedCalls):
    """Heartbeats are futures that the machine resolves; a stream for each replica."""

    def __init__(self) -> None:
        super().__init__()
        self.cold_starts = False
        self.known = dict.fromkeys(NAMES, True)
        self.beats: list[asyncio.Future[list[bytes]]] = []
        self.streams: dict[str, asyncio.Queue[bytes]] = {}

    async def heartbeat(self, report: bytes, _timeout_s: float) -> list[bytes]:
        """Until the machine answers."""
        assert report == b"mine"
        self.beats.append(asyncio.get_running_loop().create_future())
        return await self.beats[-1]

    def serving(self, replica_id: str) -> bool:
        """As the machine says."""
        return self.known[replica_id]

    async def steps(self, replica_id: str) -> Any:
        """Of one replica."""
        queue = self.streams[replica_id] = asyncio.Queue()
        while True:
            yield await queue.get()


@dataclass(slots=True)
class Known:
    """What the machine knows of one replica."""

    seen_s: float
    heard_s: float = 0.0
    limit: int = 0
    left: bool = False
    stuck: bool = False
    error: bool = False
    open: int = 0


class FleetMachine(RuleBasedStateMachine):
    """Three replicas that come and go; requests that stay open at them."""

    @initialize(cold=st.booleans())
    def build(self, cold: bool) -> None:
        self.stack = ExitStack()
        self.clock = self.stack.enter_context(turned_by_hand(link_module, replicas_module))
        self.loop = HandLoop()
        self.calls = FleetCalls()
        self.calls.cold_starts = cold
        self.known: dict[str, Known] = {}
        self.limit: int | None = None
        self.taken = 0
        self.tasks: list[tuple[str, asyncio.Task[None]]] = []
        self.dead: list[str] = []
        self.expected_dead: list[str] = []
        self.waiting: list[asyncio.Task[None]] = []
        self.replicas = Replicas(self.calls, self, lambda: b"mine")  # type: ignore[arg-type]

    # What links tell their listener.

    def news(self) -> None:
        """See `link.Listener`."""

    def died(self, replica_id: str, _at_work: Any) -> None:
        """See `link.Listener`."""
        self.dead.append(replica_id)

    # Heartbeats.

    @precondition(lambda self: len(self.waiting) < 3)
    @rule()
    def asks_for_news(self) -> None:
        async def refresh() -> None:
            await self.replicas.refresh()

        self.waiting.append(self.loop.begin(refresh()))

    @precondition(lambda self: self.waiting)
    @rule(
        names=st.sets(which_one),
        stuck=st.sampled_from([None, None, *NAMES]),
        error=st.sampled_from([None, None, *NAMES]),
        limit=st.integers(64, 70),
    )
    def these_answer(self, names: set[str], stuck: str, error: str, limit: int) -> None:
        self.taken += 1
        answers = []
        for place, name in enumerate(sorted(names)):
            limit += (-1) ** place  # no two alike
            report = replace(
                report_of(ReplicaSnapshot(replica_id=name, taken=self.taken)),
                context_limit=limit,
                stuck_s=3.0 if name == stuck else 0.0,
                error="broke" if name == error else None,
            )
            answers.append(encode_replica(report))
            one = self.known.setdefault(name, Known(seen_s=0.0))
            one.seen_s, one.left, one.limit = self.clock.now_s, False, limit
            one.stuck, one.error = name == stuck, name == error
            self.limit = limit
        self.answer(answers)

    @precondition(lambda self: self.waiting)
    @rule()
    def nobody_answers(self) -> None:
        self.answer(ConnectionError("planted"))

    def answer(self, outcome: list[bytes] | Exception) -> None:
        beat = self.calls.beats.pop()
        assert not self.calls.beats, "two heartbeats at once"
        if isinstance(outcome, Exception):
            beat.set_exception(outcome)
        else:
            beat.set_result(outcome)
        self.loop.spin()
        assert all(task.done() and task.exception() is None for task in self.waiting)
        self.waiting.clear()

    # What becomes of replicas.

    @rule(seconds=st.sampled_from([1.0, 4.0, 6.0, 11.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule(name=which_one)
    def serve_learns(self, name: str) -> None:
        """Of its start or of its end."""
        self.calls.known[name] = not self.calls.known[name]

    @precondition(lambda self: self.known and len(self.tasks) < 4)
    @rule(which=st.integers(0, 2))
    def a_request_goes(self, which: int) -> None:
        name = sorted(self.known)[which % len(self.known)]
        request = ask(f"q{self.taken}-{len(self.calls.calls)}", [1])

        async def consume() -> None:
            async for _ in self.replicas.links[name].run(request):
                pass

        self.tasks.append((name, self.loop.begin(consume())))
        self.known[name].open += 1

    @precondition(lambda self: self.known and len(self.tasks) < 4)
    @rule(which=st.integers(0, 2), speaks=st.booleans())
    def it_is_silent(self, which: int, speaks: bool) -> None:
        """With a request: it answers no heartbeat, and perhaps still sends steps."""
        self.a_request_goes(which)
        self.time_passes(SILENT_S + 1)
        if speaks:
            self.time_passes(LOST_S)
            self.a_step_comes(which)
        self.the_lost_are_forgotten()

    @precondition(lambda self: self.tasks)
    @rule(which=st.integers(0, 3))
    def its_client_leaves(self, which: int) -> None:
        name, task = self.tasks.pop(which % len(self.tasks))
        task.cancel()
        self.known[name].open -= 1
        self.loop.spin()

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 2))
    def a_call_finds_it_gone(self, which: int) -> None:
        name = sorted(self.known)[which % len(self.known)]
        self.known[name].left = self.replicas.links[name].left = True

    @precondition(lambda self: any(one.open for one in self.known.values()))
    @rule(which=st.integers(0, 2))
    def a_step_comes(self, which: int) -> None:
        """One that does not answer may still speak."""
        there = [name for name, one in sorted(self.known.items()) if one.open]
        name = there[which % len(there)]
        self.taken += 1
        item = encode_step(ReplicaSnapshot(replica_id=name, taken=self.taken), [])
        self.calls.streams[name].put_nowait(item)
        self.known[name].heard_s = self.clock.now_s
        self.loop.spin()

    @rule()
    def the_lost_are_forgotten(self) -> None:
        self.replicas.drop_lost()
        for name, one in list(self.known.items()):
            silent_s = self.clock.now_s - max(one.seen_s, one.heard_s)
            if silent_s > (LOST_S if one.open else SILENT_S):
                del self.known[name]
                self.expected_dead.append(name)
        self.loop.spin()
        lost = [pair for pair in self.tasks if pair[0] not in self.known]
        self.tasks = [pair for pair in self.tasks if pair[0] in self.known]
        assert all(task.done() and task.exception() for _, task in lost), "waits for a lost one"

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "replicas"):
            return
        assert set(self.replicas.links) == set(self.known)
        assert self.dead == self.expected_dead
        live = {
            name
            for name, one in self.known.items()
            if self.clock.now_s - one.seen_s < SILENT_S
            and not (one.left or one.stuck or one.error)
            and self.calls.known[name]
        }
        assert {link.replica_id for link in self.replicas.live()} == live, "who is sent to"
        nobody = not any(self.calls.known[name] for name in self.known)
        cold = self.calls.cold_starts and self.limit is not None and nobody
        assert self.replicas.cold() == cold
        assert len(self.calls.beats) <= 1, "a heartbeat for each who asks"
        assert len(self.replicas.reports()) == len(self.known)
        self.says_why()

    @rule()
    def asks_for_the_limit(self) -> None:
        """The smallest of those that are there; else of those that were."""
        self.limit = min((one.limit for one in self.known.values()), default=self.limit)
        assert self.replicas.find_context_limit() == self.limit

    def says_why(self) -> None:
        why = self.replicas.why_none()
        if any(one.error for one in self.known.values()):
            assert "failed" in why
        elif any(one.stuck for one in self.known.values()):
            assert "stuck" in why
        else:
            assert why == ("no replica answers" if self.known else "loading")

    def teardown(self) -> None:
        if hasattr(self, "stack"):
            self.loop.close()
            self.stack.close()
