"""`Outbox` and `Mailbox` together: chunks from an engine to consumers, over readers that come,
dawdle, are replaced and hung up on.

What must hold: a consumer takes each chunk of its request once and in order, before it hears of a
failure; a call ends with its last choice; a stream is hung up on only when nothing is left to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_loop import ask

from fabric.cluster.link import Lost, Mailbox
from fabric.cluster.outbox import Outbox
from fabric.cluster.wire import decode_step
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

which_one = st.integers(0, 9)
SPINS = 8  # turns of the loop in which whatever can go on has gone on


@dataclass(slots=True)
class Asked:
    """One request at both ends."""

    request: Request
    call: asyncio.Future[None]
    mailbox: Mailbox
    running: list[int]  # choices that the engine still draws for
    drawn: list[TokenChunk] = field(default_factory=list)
    read: int = 0  # of those drawn, how many have come to the mailbox
    taken: list[TokenChunk] = field(default_factory=list)
    failed: bool = False


class DeliveryMachine(RuleBasedStateMachine):
    """One dispatcher at one replica."""

    @initialize()
    def build(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.outbox = Outbox("d")
        self.asked: list[Asked] = []
        self.reader: AsyncIterator[bytes] | None = None
        self.next_item: asyncio.Task[bytes] | None = None
        self.closed = False
        self.another_reader()

    @precondition(lambda self: not self.closed and len(self.asked) < 6)
    @rule(choices=st.integers(1, 2))
    def open(self, choices: int) -> None:
        request = ask(f"q{len(self.asked)}", [1], n=choices)
        call = self.loop.run_until_complete(self._open(request))
        asked = Asked(request, call, Mailbox(request), list(range(choices)))
        self.asked.append(asked)

    @precondition(lambda self: self._running())
    @rule(which=which_one, choice=which_one, last=st.booleans())
    def draw_one(self, which: int, choice: int, last: bool) -> None:
        self._draw(which, choice, last)

    @precondition(lambda self: self._running())
    @rule(which=which_one, choice=which_one)
    def draw_two_in_a_step(self, which: int, choice: int) -> None:
        self._draw(which, choice, last=False)
        self._draw(which, choice, last=False)
        self.step_ends()

    def _draw(self, which: int, choice: int, last: bool) -> None:
        one = self._running()[which % len(self._running())]
        number = one.running[choice % len(one.running)]
        chunk = TokenChunk(
            request_id=one.request.request_id,
            choice=number,
            position=len(one.drawn),
            tokens=(len(one.drawn),),
            finish=Finish.LENGTH if last else None,
        )
        one.drawn.append(chunk)
        if last:
            one.running.remove(number)
        self.outbox.put(chunk)

    @precondition(lambda self: not self.closed)
    @rule()
    def step_ends(self) -> None:
        self.outbox.flush(ReplicaSnapshot(replica_id="r", taken=1))
        self._spin()

    @precondition(lambda self: any(not one.drawn for one in self._running()))
    @rule(which=which_one)
    def refuse(self, which: int) -> None:
        new = [one for one in self._running() if not one.drawn]
        one = new[which % len(new)]
        self.outbox.refuse(one.request.request_id, "too long")
        one.running.clear()
        assert one.call.done()
        assert isinstance(one.call.exception(), ValueError)

    @precondition(lambda self: not self.closed)
    @rule()
    def another_reader(self) -> None:
        while self.next_item is not None and self.next_item.done():
            self.read()  # what is on its way arrives
        before = self.next_item
        self.reader = self.outbox.items()
        self.next_item = self.loop.create_task(anext(self.reader))  # type: ignore[arg-type]
        self._spin()
        if before is not None:
            assert before.done(), "two readers of one stream"
            assert isinstance(before.exception(), StopAsyncIteration)

    @precondition(lambda self: self.next_item is not None and self.next_item.done())
    @rule()
    def read(self) -> None:
        assert self.next_item is not None and self.reader is not None
        try:
            step = decode_step(self.next_item.result())
        except StopAsyncIteration:
            self.reader = self.next_item = None
            return
        by_name = {one.request.request_id: one for one in self.asked}
        for chunk in step.chunks:
            one = by_name[chunk.request_id]
            assert chunk == one.drawn[one.read], "lost, doubled or out of order"
            one.read += 1
            one.mailbox.put(chunk)
        self.next_item = self.loop.create_task(anext(self.reader))  # type: ignore[arg-type]
        self._spin()

    @precondition(lambda self: not self.closed)
    @rule()
    def hang_up(self) -> None:
        idle = self.next_item is not None and not self.next_item.done()
        owing = bool(self.outbox.opened)
        self.outbox.hang_up()
        self._spin()
        if idle:
            assert self.next_item is not None
            assert self.next_item.done() == (not owing), "hung up on someone who waits, or not"

    @precondition(lambda self: self.asked)
    @rule(which=which_one)
    def fail(self, which: int) -> None:
        one = self.asked[which % len(self.asked)]
        if one.mailbox.choices_left:
            one.failed = True
        one.mailbox.fail(Lost("r"))

    @precondition(lambda self: self.asked)
    @rule(which=which_one)
    def take(self, which: int) -> None:
        one = self.asked[which % len(self.asked)]
        due = one.drawn[len(one.taken) : one.read]
        assert one.mailbox.pending() == bool(due or one.failed)
        taking = self.loop.create_task(one.mailbox.take())
        self._spin()
        if due:
            assert taking.exception() is None, "a failure overtook what had come"
            assert list(taking.result()) == due
            one.taken += due
        elif one.failed:
            assert isinstance(taking.exception(), Lost)
        else:
            assert not taking.done(), "something came of nothing"
            taking.cancel()
            self._spin()

    @precondition(lambda self: len(self.asked) > 3)
    @rule()
    def close(self) -> None:
        open_calls = [one for one in self.asked if one.running]
        self.outbox.close()
        self._spin()
        self.closed = True
        assert all(one.call.done() for one in open_calls)
        assert all(isinstance(one.call.exception(), ConnectionError) for one in open_calls)
        for one in self.asked:
            one.running.clear()

    @invariant()
    def check(self) -> None:
        for one in self.asked:
            assert one.call.done() == (not one.running), "a call ends with its last choice"
            finished = sum(chunk.finish is not None for chunk in one.drawn[: one.read])
            assert one.mailbox.choices_left == one.request.choices_left - finished
        open_now = {one.request.request_id for one in self.asked if one.running}
        assert set(self.outbox.opened) == open_now

    def teardown(self) -> None:
        for end in [*(one.call for one in self.asked), self.next_item]:
            if end is not None and end.done():
                end.exception()
        self.loop.run_until_complete(self._end())
        self.loop.close()

    async def _open(self, request: Request) -> asyncio.Future[None]:
        return self.outbox.open(request)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _running(self) -> list[Asked]:
        return [one for one in self.asked if one.running]

    def _spin(self) -> None:
        async def turns() -> None:
            for _ in range(SPINS):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())
