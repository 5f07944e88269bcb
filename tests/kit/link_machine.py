"""A `Link` to one replica, over calls and a stream that end in every way that Serve knows.

What must hold: a consumer gets each chunk of its request that came, once and in order, and then
its end or what became of the replica; the stream is open, once, while anything is; a call is
cancelled exactly if its client leaves while something is still being drawn for it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_loop import ask
from kit.hand_loop import HandLoop
from kit.local_replica import Killed
from kit.reports import report_of
from kit.scripted_calls import ScriptedCalls

import fabric.cluster.link as link_module
from fabric.cluster.link import Link, Lost, NotSent, ReplicaGone
from fabric.cluster.wire import encode_step
from fabric.core.errors import RequestError, Unavailable
from fabric.core.request import Finish, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

which_one = st.integers(0, 9)

# How a call may end badly -> what its consumer is told.
CALL_ENDS: dict[type[BaseException], type[Exception]] = {
    ReplicaGone: NotSent,
    ConnectionRefusedError: NotSent,
    ConnectionError: Lost,
    ValueError: RequestError,
    Killed: Lost,
    RuntimeError: Lost,
    asyncio.CancelledError: Unavailable,
}


@dataclass(slots=True)
class Client:
    """One request: what the replica drew, what its consumer got, and what should become of it."""

    name: str
    call: asyncio.Future[None]
    running: list[int]  # choices that have not come to their end
    choices: int
    task: asyncio.Task[None] | None = None
    got: list[TokenChunk] = field(default_factory=list)
    due: list[TokenChunk] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    asked: list[tuple[int, asyncio.Future[None]]] = field(default_factory=list)
    told: type[Exception] | None = None
    left: bool = False
    positions: dict[int, int] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Its consumer waits for more."""
        return not self.left and self.told is None and bool(self.running)


class LinkMachine(RuleBasedStateMachine):
    """One dispatcher, one replica, up to eight requests."""

    @initialize()
    def build(self) -> None:
        self.loop = HandLoop()
        self.pauses = link_module.REOPEN_S, link_module.LAST_WORD_S
        link_module.REOPEN_S = link_module.LAST_WORD_S = 0.0
        self.calls = ScriptedCalls()
        self.clients: list[Client] = []
        self.taken = 0  # of the newest snapshot sent
        self.heard: list[tuple[str, Any]] = []  # news and deaths, as the listener hears them
        self.expected: list[tuple[str, Any]] = []
        self.left = False
        self.closed = False
        self.link = self.loop.run(self._made())
        self.loop.spin()

    async def _made(self) -> Link:
        return Link("r", self.calls, self)  # type: ignore[arg-type]

    # What the link tells its listener.

    def news(self) -> None:
        """See `link.Listener`."""
        self.heard.append(("news", self.link.snapshot.taken))

    def died(self, replica_id: str, at_work: Any) -> None:
        """See `link.Listener`: what is open is told after this."""
        assert replica_id == "r"
        assert all(box._error is None for box in self.link.opened.values()), "told too early"
        self.heard.append(("died", at_work if at_work is None else sorted(at_work)))

    # Requests.

    @precondition(lambda self: self.closed)
    @rule()
    def sends_to_whom_it_has_forgotten(self) -> None:
        """A second leg, on a link that was chosen before the first one began."""
        calls = len(self.calls.calls)

        async def consume() -> None:
            async for _ in self.link.run(ask("late", [1])):
                pass

        task = self.loop.begin(consume())
        assert task.done() and isinstance(task.exception(), NotSent), "it waits, and nobody reads"
        assert len(self.calls.calls) == calls

    @precondition(lambda self: not self.closed and len(self.clients) < 8)
    @rule(choices=st.integers(1, 3))
    def sends(self, choices: int) -> None:
        request = ask(f"q{len(self.clients)}", [1], n=choices)
        name = request.request_id

        async def consume() -> None:
            async for chunks in self.link.run(request):
                one.got += chunks

        task = self.loop.begin(consume())
        one = Client(name, self.calls.calls[name], list(range(choices)), choices, task)
        self.clients.append(one)

    @precondition(lambda self: self._open())
    @rule(which=which_one, data=st.data())
    def an_item_comes(self, which: int, data: st.DataObject) -> None:
        """Tokens of some choices in one step; some of them end."""
        queue = self._reader()
        one = self._pick(which)
        chunks = []
        for choice in list(one.running):
            kind = data.draw(st.sampled_from(["nothing", "token", "last"]))
            if kind != "nothing":
                finish = Finish.LENGTH if kind == "last" else None
                if finish and choice in one.stopped:
                    finish = Finish.ABORT
                chunks.append(self._chunk(one, choice, finish))
        self._send_step(queue, chunks, newer=data.draw(st.booleans()))
        if not one.running and not one.call.done():
            one.call.set_result(None)
            self.loop.spin()

    @precondition(lambda self: self._open())
    @rule(which=which_one)
    def chunks_of_nobody_come(self, which: int) -> None:
        stray = TokenChunk(request_id="nobody", choice=0, position=0, tokens=(1,), finish=None)
        self._send_step(self._reader(), [stray], newer=bool(which % 2))

    @precondition(lambda self: self._open())
    @rule(guilty=st.integers(1, 255))
    def the_engine_breaks(self, guilty: int) -> None:
        """A last chunk for each that is open: who was at work, and who was not."""
        there = self._open()
        at_work = [one for place, one in enumerate(there) if guilty >> place & 1]
        chunks = []
        for one in there:
            finish = Finish.ERROR if one in at_work else Finish.ABORT
            chunk = TokenChunk(request_id=one.name, choice=0, position=0, tokens=(), finish=finish)
            chunks.append(chunk)
        if at_work:
            self.expected.append(("died", sorted(one.name for one in at_work)))
            self.left = True
        for one, chunk in zip(there, chunks, strict=True):
            if chunk.finish is Finish.ABORT:
                one.due.append(chunk)
                one.running.remove(0 if 0 in one.running else one.running[0])
            if at_work and one.running:
                one.told = Lost
        self._send_step(self._reader(), chunks, newer=True)

    @precondition(lambda self: [one for one in self._open() if one.positions])
    @rule(which=which_one, choice=which_one)
    def asks_for_the_end_of_a_choice(self, which: int, choice: int) -> None:
        """Be it one that is over: its consumer may be behind."""
        there = [one for one in self._open() if one.positions]
        one = there[which % len(there)]
        self._stop(one, choice % one.choices)

    @precondition(lambda self: any(one.asked for one in self.clients))
    @rule(which=which_one, heard=st.booleans())
    def is_answered(self, which: int, heard: bool) -> None:
        """Its client may have left meanwhile: then what can't be asked to end is cancelled."""
        there = [one for one in self.clients if one.asked]
        one = there[which % len(there)]
        number, asked = one.asked.pop(0)
        if heard:
            asked.set_result(None)
        else:
            asked.set_exception(ConnectionError("planted"))
            one.stopped.discard(number)
        running = not one.call.done()
        self.loop.spin()
        if running:
            ends = not heard and one.left and number in one.running
            assert one.call.cancelled() == ends, "drawn for nobody, or ended for nothing"

    @precondition(lambda self: self._open())
    @rule(which=which_one, all_but=st.integers(0, 1), ends=st.booleans())
    def has_all_that_it_wants(self, which: int, all_but: int, ends: bool) -> None:
        """Every choice is asked to end, or all but one, and its client leaves; one may have ended
        just now."""
        one = self._pick(which)
        if ends and len(one.running) > 1:
            last = self._chunk(one, one.running[-1], Finish.LENGTH)
            self._send_step(self._reader(), [last], newer=True)
        for number in range(one.choices):
            if number not in one.running[:all_but]:
                self._stop(one, number)
        self.leaves(self._open().index(one))

    def _stop(self, one: Client, number: int) -> None:
        if number in one.running:
            one.stopped.add(number)
        self.loop.run(self._abort(one.name, number))
        one.asked.append((number, self.calls.asked.pop()))

    async def _abort(self, name: str, choice: int) -> None:
        self.link.abort_choice(name, choice)

    @precondition(lambda self: self._open())
    @rule(which=which_one)
    def leaves(self, which: int) -> None:
        one = self._pick(which)
        assert one.task is not None
        one.task.cancel()
        self.loop.spin()
        one.left = True
        drawn = set(one.running) - one.stopped
        assert one.call.cancelled() == bool(drawn), "cancelled for nothing, or not at all"

    # What becomes of calls and of the stream.

    @precondition(lambda self: self._open())
    @rule(which=which_one, end=st.sampled_from(list(CALL_ENDS)))
    def a_call_ends_badly(self, which: int, end: type[BaseException]) -> None:
        one = self._pick(which)
        if end is asyncio.CancelledError:
            one.call.cancel()
        else:
            one.call.set_exception(end("planted"))
        if CALL_ENDS[end] is NotSent:
            self.left = True
        one.told = CALL_ENDS[end]
        if end is Killed:
            self._dies()
        self.loop.spin()

    @precondition(lambda self: self._open())
    @rule(which=which_one)
    def a_call_ends_well_and_its_last_word_does_not_come(self, which: int) -> None:
        one = self._pick(which)
        one.call.set_result(None)
        one.told = Lost
        self.loop.spin()

    @precondition(lambda self: self.calls.readers)
    @rule(end=st.sampled_from([None, ReplicaGone, OSError, ConnectionError, RuntimeError, Killed]))
    def the_stream_ends(self, end: type[Exception] | None) -> None:
        before = self.calls.opened
        waiting = bool(self._open())
        self._reader().put_nowait(None if end is None else end("planted"))
        if end is Killed:
            self._dies()
        if end in (Killed, RuntimeError):
            for one in self._open():
                one.told = Lost
        self.loop.spin()
        if waiting and end not in (Killed, RuntimeError):
            assert self.calls.opened == before + 1, "somebody waits, and nobody reads"

    # Heartbeats.

    @precondition(lambda self: not self.closed)
    @rule(newer=st.booleans())
    def a_heartbeat_is_answered(self, newer: bool) -> None:
        snapshot = self._snapshot(newer=newer)
        self.link.update(report_of(snapshot), 1.0)
        assert self.link.seen_s == 1.0
        self.left = False

    @rule()
    def what_is_open_is_lost(self) -> None:
        self.link.lose()
        for one in self._open():
            one.told = Lost
        self.loop.spin()

    @precondition(lambda self: len(self.clients) > 4 and not self.closed)
    @rule()
    def is_forgotten(self) -> None:
        self.closed = True
        self._dies()
        self.link.close()
        self.loop.spin()
        assert not self.calls.readers, "a stream to a replica that nobody knows"

    @invariant()
    def check(self) -> None:
        assert self.heard == self.expected
        assert self.link.snapshot.taken == self.taken
        assert self.link.left == self.left
        assert set(self.link.opened) == {one.name for one in self._open()}
        assert len(self.calls.readers) <= 1, "two readers of one stream"
        assert self.calls.readers or not self._open() or self.closed, "nobody listens"
        for one in self.clients:
            assert one.got == one.due, "lost, doubled or out of order"
            assert one.task is not None and one.task.done() == (not one.open)
            if one.open or one.left:
                continue
            problem = one.task.exception()
            assert (type(problem) if problem else None) == one.told

    def teardown(self) -> None:
        link_module.REOPEN_S, link_module.LAST_WORD_S = self.pauses
        self.loop.close()

    def _dies(self) -> None:
        self.expected.append(("died", None))
        self.left = True
        for one in self._open():
            one.told = Lost

    def _chunk(self, one: Client, choice: int, finish: Finish | None) -> TokenChunk:
        position = one.positions.get(choice, 0)
        one.positions[choice] = position + 1
        if finish is not None:
            one.running.remove(choice)
        chunk = TokenChunk(
            request_id=one.name, choice=choice, position=position, tokens=(position,), finish=finish
        )
        one.due.append(chunk)
        return chunk

    def _send_step(
        self,
        queue: asyncio.Queue[bytes | BaseException | None],
        chunks: list[TokenChunk],
        *,
        newer: bool,
    ) -> None:
        queue.put_nowait(encode_step(self._snapshot(newer=newer), chunks))
        self.loop.spin()

    def _snapshot(self, *, newer: bool) -> ReplicaSnapshot:
        """A newer one is news; one that was overtaken on its way is not."""
        if not newer:
            return ReplicaSnapshot(replica_id="r", taken=max(0, self.taken - 1))
        self.taken += 1
        self.expected.append(("news", self.taken))
        return ReplicaSnapshot(replica_id="r", taken=self.taken)

    def _open(self) -> list[Client]:
        return [one for one in self.clients if one.open]

    def _pick(self, which: int) -> Client:
        there = self._open()
        return there[which % len(there)]

    def _reader(self) -> asyncio.Queue[bytes | BaseException | None]:
        assert len(self.calls.readers) == 1, "nobody listens"
        return self.calls.readers[0]
