"""`Detours` over two `Link`s, whose calls and streams end in every way.

What must hold: the client gets token 1 from the one and the others from the other, and one end; the
decode replica is asked for room once, and told to wait no longer exactly if it still may wait, and
never before it was asked; what is counted is what happened.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_loop import ask
from kit.hand_loop import HandLoop
from kit.reports import report_of
from kit.scripted_calls import ScriptedCalls

from fabric.cluster.detour import Detours
from fabric.cluster.link import Link, Lost
from fabric.cluster.wire import decode_request, encode_step
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.fetching import Fetch
from fabric.core.traffic.journey import Journey

PREFILL, DECODE = "p", "d"
Future = asyncio.Future[Any]

which_one = st.integers(0, 3)


class PairCalls(ScriptedCalls):
    """Two replicas. `asked`: for room, in order; `told`: (request, why) to wait no longer."""

    def __init__(self) -> None:
        super().__init__()
        self.open: dict[tuple[str, str], tuple[Request, str | None, Future]] = {}
        self.streams: dict[str, asyncio.Queue[bytes]] = {}
        self.room: dict[str, Future] = {}
        self.told: list[tuple[str, str]] = []

    def generate(
        self,
        replica_id: str,
        request: bytes,
        target: str | None = None,
        epoch: int = 0,
        _fetch: Fetch | None = None,
    ) -> Any:
        """A future that the machine resolves."""
        call: Future = asyncio.get_running_loop().create_future()
        asked = decode_request(request)
        assert target is None or epoch > 0
        self.open[replica_id, asked.request_id] = (asked, target, call)
        return call

    async def steps(self, replica_id: str) -> Any:
        """Of one replica."""
        queue = self.streams[replica_id] = asyncio.Queue()
        while True:
            yield await queue.get()

    def reserve(self, replica_id: str, request: bytes, _epoch: int) -> Future:
        """Is there room? The machine says."""
        name = decode_request(request).request_id
        assert replica_id == DECODE and name not in self.room, "asked once, and of the right one"
        self.room[name] = asyncio.get_running_loop().create_future()
        return self.room[name]

    async def give_up(self, replica_id: str, request_id: str, reason: str) -> None:
        """Noted."""
        assert replica_id == DECODE
        assert self.room[request_id].done(), "it overtakes what it takes back"
        self.told.append((request_id, reason))


@dataclass(slots=True)
class Traveller:
    """One request. `reserved`: the decode replica may hold room for it, as far as is known."""

    journey: Journey
    task: asyncio.Task[None]
    stage: str = PREFILL
    reserved: bool = True
    answered: bool = False
    owed: str | None = None  # why it is given up, once the question for room is answered
    over: bool = False
    arrived: bool = False  # its second token
    due: list[tuple[int, Finish | None]] = field(default_factory=list)
    got: list[tuple[int, Finish | None]] = field(default_factory=list)
    lost: bool = False

    @property
    def name(self) -> str:
        """Its own."""
        return self.journey.request.request_id


class DetourMachine(RuleBasedStateMachine):
    """A few requests on their way at once."""

    @initialize()
    def build(self) -> None:
        self.loop = HandLoop()
        self.calls = PairCalls()
        self.all: list[Traveller] = []
        self.told: list[tuple[str, str]] = []
        self.counts: Counter[str] = Counter()
        self.loop.run(self.make())
        self.loop.spin()

    async def make(self) -> None:
        self.detours = Detours()
        self.prefill, self.decode = (Link(name, self.calls, self) for name in (PREFILL, DECODE))
        self.decode.update(report_of(ReplicaSnapshot(replica_id=DECODE, taken=1)), 1.0)

    def news(self) -> None:
        """See `link.Listener`."""

    def died(self, _replica_id: str, _at_work: Any) -> None:
        """See `link.Listener`."""

    # What clients do.

    @precondition(lambda self: len(self.all) < 12)
    @rule(longest=st.booleans())
    def begins(self, longest: bool) -> None:
        """`longest`: its prompt and one token fill the decode replica's context."""
        prompt = [1] * (63 if longest else 8)
        journey = Journey(ask(f"q{len(self.all)}", prompt))

        async def consume() -> None:
            async for chunks in self.detours.run(journey, self.prefill, self.decode):
                for chunk in journey.note(chunks):
                    one.got += [(token, chunk.finish) for token in chunk.tokens]

        one = Traveller(journey, self.loop.begin(consume()))
        self.all.append(one)
        asked, target, _ = self.calls.open[PREFILL, one.name]
        assert target == DECODE and asked.sampling.max_tokens == 1

    @precondition(lambda self: self.there(PREFILL))
    @rule(which=which_one)
    def wants_no_more(self, which: int) -> None:
        """Its text holds a stop string; token 1 is still to come."""
        one = self.pick(PREFILL, which)
        one.journey.stop(0)

    @precondition(lambda self: self.there(PREFILL) + self.there(DECODE))
    @rule(which=which_one)
    def leaves(self, which: int) -> None:
        there = self.there(PREFILL) + self.there(DECODE)
        one = there[which % len(there)]
        call = self.call(one)
        one.task.cancel()
        self.loop.spin()
        assert call.cancelled(), "drawn for nobody"
        self.ends(one, "")

    # What the prefill replica does.

    @precondition(lambda self: self.there(PREFILL))
    @rule(which=which_one, finish=st.sampled_from([Finish.LENGTH, Finish.LENGTH, Finish.STOP]))
    def draws_the_first(self, which: int, finish: Finish) -> None:
        one = self.pick(PREFILL, which)
        last = finish is Finish.STOP or len(one.journey.request.prompt) == 63
        stopped = one.journey.done
        one.due.append((0, finish if last else None))
        self.draw(one, 0, finish)
        if last:
            self.ends(one, "ended")
            return
        self.counts["sampled"] += 1
        if stopped:
            self.ends(one, "")
            return
        one.stage = DECODE
        asked, target, _ = self.calls.open[DECODE, one.name]
        assert asked.generated == ((0,),) and target is None, "it goes on from token 1"

    @precondition(lambda self: self.there(PREFILL) + self.there(DECODE))
    @rule(which=which_one)
    def is_lost(self, which: int) -> None:
        """The replica that it is on gives it up."""
        there = self.there(PREFILL) + self.there(DECODE)
        one = there[which % len(there)]
        reason = "prefill_lost" if one.stage == PREFILL else "decode_lost"
        self.counts[reason] += 1
        self.call(one).set_exception(ConnectionError("planted"))
        one.lost = True
        self.loop.spin()
        self.ends(one, reason)

    # What the decode replica does.

    @precondition(lambda self: any(not one.answered for one in self.all))
    @rule(which=which_one, room=st.sampled_from([True, True, False, None]))
    def says_whether_there_is_room(self, which: int, room: bool | None) -> None:
        """None: it can't be asked."""
        there = [one for one in self.all if not one.answered]
        one = there[which % len(there)]
        one.answered = True
        question = self.calls.room[one.name]
        if room is None:
            question.set_exception(ConnectionError("planted"))
        else:
            question.set_result(room)
        self.loop.spin()
        if not room:
            one.reserved = False
            self.counts["refused"] += 1
        if one.owed is not None:
            self.told.append((one.name, one.owed))

    @precondition(lambda self: self.there(DECODE))
    @rule(which=which_one, last=st.booleans())
    def draws_another(self, which: int, last: bool) -> None:
        one = self.pick(DECODE, which)
        token = len(one.due)
        last = last or token == 7
        finish = Finish.LENGTH if last else None
        one.due.append((token, finish))
        if not one.arrived:
            one.arrived = True
            self.counts["gaps"] += 1
        self.draw(one, token, finish)
        if last:
            one.over = True  # the room was for it, and it has used it

    @rule()
    def time_passes(self) -> None:
        self.loop.spin()

    @invariant()
    def exact(self) -> None:
        if not hasattr(self, "detours"):
            return
        assert self.calls.told == self.told, "who waits for KV that will not come, or may still"
        under_way = [one for one in self.all if not one.over and not one.arrived]
        assert self.detours.under_way == len(under_way), "how many are under way"
        counts = {k: v for k, v in self.detours.counts.items() if k != "gap_seconds"}
        assert counts == +self.counts, "what is counted"
        assert (len(self.prefill.opened), len(self.decode.opened)) == (
            len(self.there(PREFILL)),
            len(self.there(DECODE)),
        ), "open where nobody waits"
        for one in self.all:
            assert one.got == one.due, "lost, doubled, or with the wrong end"
            assert one.task.done() == one.over
            if one.lost:
                assert isinstance(one.task.exception(), Lost)

    # How.

    def ends(self, one: Traveller, reason: str) -> None:
        """Otherwise than by its last token from the decode replica."""
        one.over = True
        if one.reserved:
            one.owed = reason
            if one.answered:
                self.told.append((one.name, reason))

    def draw(self, one: Traveller, token: int, finish: Finish | None) -> None:
        chunk = TokenChunk(
            request_id=one.name, choice=0, position=token, tokens=(token,), finish=finish
        )
        call = self.call(one)
        item = encode_step(ReplicaSnapshot(replica_id=one.stage, taken=1), [chunk])
        self.calls.streams[one.stage].put_nowait(item)
        self.loop.spin()
        if finish is not None and not call.done():
            call.set_result(None)
            self.loop.spin()

    def call(self, one: Traveller) -> Future:
        return self.calls.open[one.stage, one.name][2]

    def there(self, stage: str) -> list[Traveller]:
        return [one for one in self.all if not one.over and one.stage == stage]

    def pick(self, stage: str, which: int) -> Traveller:
        there = self.there(stage)
        return there[which % len(there)]

    def teardown(self) -> None:
        if hasattr(self, "loop"):
            self.loop.close()
