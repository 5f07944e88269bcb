"""One engine replica: the real `Engine`, turned as `cluster.engine_loop` turns it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from fabric.core.engine.engine import Engine, Refused
from fabric.core.engine.forward import running, steady_steps, steady_until
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.request import Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot
from fabric.sim.clock import NS_PER_MS, Clock
from fabric.sim.costs import Profile
from fabric.sim.porter import Destination, Porter
from fabric.sim.worker import SyntheticWorker

MIXED = "mixed"  # the pool of replicas that do both, prompts and outputs
FRUITLESS_WAIT_NS = 10 * NS_PER_MS  # work, but nothing could be planned


class Stage(StrEnum):
    """Of a replica's life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"  # takes nothing new, finishes what it has
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What one step sends one dispatcher: the state after it and the tokens of its requests.

    `refused`: (request id, reason) of those that can never run here.
    """

    replica_id: str
    snapshot: ReplicaSnapshot
    chunks: tuple[TokenChunk, ...]
    refused: tuple[tuple[str, str], ...] = ()


class Receives(Protocol):
    """A dispatcher, as a replica sees it."""

    name: str
    wire: Callable[[str], int]

    def receive(self, item: Item) -> None:
        """An item has arrived."""
        ...


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decode steps that are all alike: when the first begins and each ends, what they bring."""

    began: int
    ends: list[int]
    tokens: list[tuple[int, ...]]
    steps_ns: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing to do before the next step: add `request`, whose KV is to leave as attempt `export`
    if that is a number; end `abort`; or `ask` the engine."""

    request: Request | None = None
    export: int | None = None
    abort: str = ""
    ask: Callable[[Engine], object] | None = None


class Replica:
    """An engine, its synthetic worker, and who waits for its tokens."""

    def __init__(
        self, name: str, clock: Clock, profile: Profile, lengths: Mapping[int, int]
    ) -> None:
        self.name = name
        self.pool = MIXED
        self.porter = Porter(clock, profile, lambda ask: self._wake(Command(ask=ask)))
        self.stage = Stage.STARTING
        self.clock = clock
        eos = profile.engine.eos_token_ids
        self.engine = Engine(profile.measured_engine())
        self.worker = SyntheticWorker(profile.costs, lengths, eos[0] if eos else None)
        self.snapshot = self.engine.snapshot(name, clock.now)
        self.ordered = clock.now  # when it was decided to have it
        self.removed: int | None = None
        self.slowdown = 1.0  # of every step: a straggler has more
        self.crashed = False
        # Decode steps that are all alike are done at once, as long as nobody comes; dispatchers
        # hear of them so late at most. None: every step is an event of its own.
        self.news_ns: int | None = None
        self._stretch: Stretch | None = None
        self._inbox: list[Command] = []
        self._held: list[TokenChunk] = []
        self._turning = False
        self._owner: dict[str, Receives] = {}
        self._open: dict[str, dict[str, int]] = {}  # dispatcher -> request -> choices left

    @property
    def idle(self) -> bool:
        """Nothing is open here."""
        return not self._owner and not self._inbox and not self.engine.has_work

    def crash(self) -> None:
        """The process is gone without a word, with all it had."""
        self.stage, self.removed = Stage.GONE, self.clock.now
        self.crashed = True
        self.porter.crash()
        self._inbox, self._held = [], []
        self._owner, self._open = {}, {}

    def forget(self, dispatcher: str) -> None:
        """Its lease has run out: what it had open is freed."""
        for request_id in list(self._open.get(dispatcher, ())):
            self.abort(request_id)
        self.porter.leave(dispatcher)

    def submit(self, request: Request, dispatcher: Receives, to: Destination | None = None) -> None:
        """A request has arrived over the link; `to`: where its prompt's KV goes."""
        assert self.stage is not Stage.GONE, "sent to a replica that is gone"
        if to is None:
            self.porter.follows(request.request_id)
        else:
            self.porter.send_to(request.request_id, to)
        self._owner[request.request_id] = dispatcher
        mine = self._open.setdefault(dispatcher.name, {})
        mine[request.request_id] = request.choices_left
        self._wake(Command(request=request, export=None if to is None else to.epoch))

    def abort(self, request_id: str) -> None:
        """The client has left: nobody waits for its tokens any more."""
        dispatcher = self._owner.pop(request_id, None)
        if dispatcher is not None:
            self.porter.stop_sending(request_id)
            self._open[dispatcher.name].pop(request_id, None)
            self._wake(Command(abort=request_id))

    def check(self) -> None:
        """The engine's own, and every open request is the engine's or on its way into it."""
        if self.crashed:
            return
        self.engine.check()
        opened = sorted(request for mine in self._open.values() for request in mine)
        assert opened == sorted(self._owner), "two views of what is open"

    def _wake(self, command: Command) -> None:
        self._inbox.append(command)
        if self._stretch is not None:
            self._cut(self._stretch)
        elif not self._turning:
            self._turning = True
            self.clock.after(0, self._turn)

    def _turn(self) -> None:
        """Obey, plan, hand out the tokens of the last step, execute: the order of `EngineLoop`."""
        if self.crashed:
            return
        now = self.clock.now
        if self.news_ns is not None and not self._inbox and self._begin_stretch(now):
            return
        commands, self._inbox = self._inbox, []
        refused = self._obey(commands, now)
        plan = self.engine.schedule(now)
        held, self._held = self._held, []
        if held or commands:
            self._send(held, refused)
        if plan is not None:
            self._execute(plan, now)
        elif self.engine.has_work:
            self.clock.after(FRUITLESS_WAIT_NS, self._turn)
        else:
            self._turning = False

    def _execute(self, plan: StepPlan, now: int) -> None:
        result = self.worker.execute(plan)
        step_ns = round(self.worker.step_ns * self.slowdown)
        self.clock.at(now + step_ns, self._commit, plan, result)

    def _begin_stretch(self, now: int) -> bool:
        """Two steps or more will be alike: they become one event."""
        assert self.news_ns is not None
        if steady_steps(self.engine, 2) < 2:
            return False
        rows = [(one.number, one.computed) for one in running(self.engine)]
        steps_ns, tokens = self.worker.foretell(rows, self.news_ns)
        begins, at = [], now
        for step_ns in steps_ns:
            begins.append(at)
            at += round(step_ns * self.slowdown)
        count = steady_steps(self.engine, len(begins)) if begins else 0
        count = min(count, bisect_left(begins, steady_until(self.engine)))
        if count < 2:
            return False
        ends = [*begins[1:], at][:count]
        held, self._held = self._held, []
        if held:
            self._send(held, ())
        self._stretch = Stretch(now, ends, tokens, steps_ns)
        self.clock.at(ends[-1], self._end_stretch, self._stretch)
        return True

    def _end_stretch(self, stretch: Stretch) -> None:
        """All of it has happened, if nobody came between."""
        if self._stretch is not stretch or self.crashed:
            return
        self._stretch = None
        self._forward(stretch, len(stretch.ends))
        self._turn()

    def _cut(self, stretch: Stretch) -> None:
        """Somebody has come: what is over is done, the step in hand is one like any other."""
        self._stretch = None
        done = bisect_right(stretch.ends, self.clock.now)
        self._forward(stretch, done)
        if done == len(stretch.ends):
            self.clock.after(0, self._turn)
            return
        held, self._held = self._held, []
        now = stretch.ends[done - 1] if done else stretch.began
        plan = self.engine.schedule(now)
        assert plan is not None, "a steady stretch goes on"
        if held:
            self._send(held, ())
        self._execute(plan, now)

    def _forward(self, stretch: Stretch, count: int) -> None:
        if count:
            tokens = [mine[:count] for mine in stretch.tokens]
            self._held = self.engine.forward(stretch.began, stretch.ends[:count], tokens)
            self.worker.note(stretch.steps_ns[:count])

    def _obey(self, commands: list[Command], now: int) -> tuple[tuple[str, str], ...]:
        refused = []
        for command in commands:
            if command.ask is not None:
                command.ask(self.engine)
                continue
            if command.request is None:
                self._held += self.engine.abort(command.abort)
                continue
            outcome = self.engine.add(command.request, now)
            if isinstance(outcome, Refused):
                refused.append((command.request.request_id, outcome.reason))
            elif command.export is not None:
                self.engine.export(command.request.request_id, command.export)
        return tuple(refused)

    def _commit(self, plan: StepPlan, result: StepResult) -> None:
        if self.crashed:
            return
        self._held = self.engine.commit(plan, result, self.clock.now)
        if plan.exports:
            self.porter.depart(plan.exports)
        if not self._held:
            self._send([], ())  # prompt tokens only; but now there may be head-room
        if self._inbox or self._held or self.engine.has_work:
            self._turn()
        else:
            self._turning = False

    def _send(self, chunks: list[TokenChunk], refused: tuple[tuple[str, str], ...]) -> None:
        """One item to each dispatcher that has something open here, as `EngineReplica._deliver`."""
        self.snapshot = self.engine.snapshot(self.name, self.clock.now)
        bundles: dict[str, tuple[Receives, list[TokenChunk]]] = {}
        for chunk in chunks:
            owner = self._owner.get(chunk.request_id)
            if owner is None:
                continue
            bundle = bundles.get(owner.name)
            if bundle is None:
                bundles[owner.name] = (owner, [chunk])
            else:
                bundle[1].append(chunk)
            if chunk.finish is not None:
                self._closed(owner, chunk.request_id)
        turned: dict[str, list[tuple[str, str]]] = {}
        for request_id, reason in refused:
            owner = self._owner.pop(request_id, None)
            self.porter.stop_sending(request_id)
            if owner is not None:
                del self._open[owner.name][request_id]
                bundles.setdefault(owner.name, (owner, []))
                turned.setdefault(owner.name, []).append((request_id, reason))
        if any(mine and name not in bundles for name, mine in self._open.items()):
            for owner in self._owner.values():
                if owner.name not in bundles:
                    bundles[owner.name] = (owner, [])
        for name, (owner, mine) in bundles.items():
            item = Item(
                replica_id=self.name,
                snapshot=self.snapshot,
                chunks=tuple(mine),
                refused=tuple(turned.get(name, ())),
            )
            self.clock.after(owner.wire(self.name), owner.receive, item)

    def _closed(self, owner: Receives, request_id: str) -> None:
        mine = self._open[owner.name]
        mine[request_id] -= 1
        if not mine[request_id]:
            del mine[request_id]
            del self._owner[request_id]
