"""Hand-overs of one replica, on its asyncio thread: KV groups that leave it, and those that come.

    prefill replica                                    decode replica
    engine loop: exports of a plan                     reserve(request)
      collect, put ──> land(request, [references]) ──> get, check, stage ──> engine.landed
      references kept until this call returns          generate(request and its first token)

Whatever goes wrong, the decode engine is told to wait no longer, and why is counted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from fabric.cluster.arrivals import (
    Arrivals,
    Assembly,
    CameBefore,
    Incoming,
    NotExpected,
    bytes_of,
)
from fabric.cluster.kv_ends import KvEnds
from fabric.core.engine.engine import Accepted, Engine
from fabric.core.engine.handover import WRONG, KvArrival, Landing
from fabric.core.engine.plan import KvExport
from fabric.core.request import Request

if TYPE_CHECKING:
    from fabric.worker.kv_transfer import GroupHeader

# So many groups for one target are in the store at once; GROUPS_WAITING are on their way or wait
# for it in the staging area, and what comes beyond is dropped.
GROUPS_AT_ONCE = 3
GROUPS_WAITING = 64
LAND_TIMEOUT_S = 15.0
# How long blocks are kept for a prompt whose first token has not come ...
RESERVE_S = 60.0
# ... and how long a request waits for its KV once it has.
WAIT_S = 3.0

log = logging.getLogger("ray.serve")

# Asks the engine something between two steps.
Ask = Callable[[Callable[[Engine], Any]], Awaitable[Any]]


class Peer(Protocol):
    """Calls to decode replicas."""

    def __call__(self, replica_id: str, request_id: str, references: Sequence[Any], /) -> Any:
        """`Porter.land` there: awaitable."""
        ...

    def give_up(self, replica_id: str, request_id: str, reason: str, /) -> Any:
        """`Porter.give_up` there: awaitable."""
        ...


@dataclass(slots=True, kw_only=True)
class Outgoing:
    """A prompt whose KV leaves."""

    target: str
    stopped: bool = False  # the rest is not wanted
    over: asyncio.Event = field(default_factory=asyncio.Event)  # no more of it will go

    def stop(self) -> None:
        """What has not gone yet will not."""
        self.stopped = True
        self.over.set()


class Lane:
    """The way to one target: a target that hangs holds up nobody else."""

    def __init__(self) -> None:
        self.room = asyncio.Semaphore(GROUPS_AT_ONCE)
        self.groups = 0  # on their way, or waiting for it


class Taken(Enum):
    """What became of groups that have come."""

    ALL = "all"
    UNWANTED = "unwanted"  # nobody waits for more of them
    WRONG = "wrong"  # lost, hurt, or others than were asked for


class Porter:
    """Both ends. `counts`: names as metrics have them; they only grow."""

    def __init__(
        self,
        ends: KvEnds,
        ask: Ask,
        peer: Peer | None = None,
        counts: dict[str, float] | None = None,
    ) -> None:
        self.counts = {} if counts is None else counts
        self._ends = ends
        self._ask = ask
        self._peer = peer
        self._outgoing: dict[str, Outgoing] = {}
        self._lanes: dict[str, Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.arrivals = Arrivals(ends)

    # -- what leaves -----------------------------------------------------------------------------

    def send_to(self, request_id: str, target: str) -> None:
        """The KV of this request's prompt goes to that replica."""
        self._outgoing[request_id] = Outgoing(target=target)

    def stop_sending(self, request_id: str) -> None:
        """No more of this request is to be sent: what waits for its turn is let go of."""
        outgoing = self._outgoing.pop(request_id, None)
        if outgoing is not None:
            outgoing.stop()

    async def sent(self, request_id: str) -> None:
        """Wait until this request's last group has gone: before that no replica is taken down."""
        outgoing = self._outgoing.get(request_id)
        if outgoing is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAND_TIMEOUT_S):
                    await outgoing.over.wait()

    def depart(self, exports: Sequence[KvExport]) -> None:
        """KV lies ready."""
        for export in exports:
            outgoing = self._outgoing.get(export.request_id)
            if outgoing is None or self._peer is None:
                self.count("groups_unwanted")
                self._ends.drop(export)
                continue
            lane = self._lanes.setdefault(outgoing.target, Lane())
            if lane.groups == GROUPS_WAITING:
                self.count("groups_dropped")
                self._ends.drop(export)
                self._fail(export.request_id, outgoing, "dropped")
                continue
            lane.groups += 1
            self._begin(self._carry(export, outgoing, lane))

    async def _carry(self, export: KvExport, outgoing: Outgoing, lane: Lane) -> None:
        """One export to its target. The references live as long as this call: the store's memory
        is free afterwards, however it ended."""
        try:
            async with lane.room:
                if outgoing.stopped:
                    self._ends.drop(export)
                    return
                await self._send(export, outgoing)
        finally:
            if export.last:
                outgoing.over.set()
                if self._outgoing.get(export.request_id) is outgoing:
                    del self._outgoing[export.request_id]
            lane.groups -= 1
            if not lane.groups:
                self._lanes.pop(outgoing.target, None)

    async def _send(self, export: KvExport, outgoing: Outgoing) -> None:
        assert self._peer is not None
        name = export.request_id
        try:
            references = await asyncio.to_thread(self._ends.depart, export)
            self.count("groups_sent", len(references))
            async with asyncio.timeout(LAND_TIMEOUT_S):
                if not await self._peer(outgoing.target, name, references):
                    self._stop(name, outgoing)
        except Exception as error:  # noqa: BLE001 - the other side does without
            self.count("groups_failed")
            # Its name only: whoever keeps the error keeps the references.
            log.warning("handing over %s failed: %s", name, type(error).__name__)
            self._fail(name, outgoing, "unsent")

    def _fail(self, name: str, outgoing: Outgoing, reason: str) -> None:
        """The other side is told, once, to wait no longer."""
        if not outgoing.stopped:
            self._stop(name, outgoing)
            self._begin(self._tell(name, outgoing.target, reason))

    async def _tell(self, name: str, target: str, reason: str) -> None:
        """If it can't be told: it does not wait for ever."""
        assert self._peer is not None
        with suppress(Exception):
            async with asyncio.timeout(LAND_TIMEOUT_S):
                await self._peer.give_up(target, name, reason)

    def _stop(self, name: str, outgoing: Outgoing) -> None:
        """As `stop_sending`, of this attempt alone."""
        outgoing.stop()
        if self._outgoing.get(name) is outgoing:
            del self._outgoing[name]

    # -- what comes ------------------------------------------------------------------------------

    async def reserve(self, request: Request, epoch: int, dispatcher: str) -> bool:
        """Keep room for a prompt. False: there is none; it may come without KV."""
        name = request.request_id
        self.arrivals.forget(name)
        timer = asyncio.get_running_loop().call_later(RESERVE_S, self._expire, name)
        # Before the engine answers: groups may come meanwhile, and the engine takes them after it.
        self.arrivals.waiting[name] = Incoming(dispatcher=dispatcher, timer=timer)
        try:
            outcome = await self._ask(lambda engine: engine.reserve(request, epoch))
        except BaseException:  # who asked has left; the engine may hear of it all the same
            self.arrivals.forget(name)
            self._begin(self.give_up(name))
            raise
        if not isinstance(outcome, Accepted):
            self.arrivals.forget(name)
            self.count("fallback_no_room")
            return False
        return True

    def expect(self, request_id: str, dispatcher: str) -> None:
        """A loan will come for this request, or `give_up`."""
        self.arrivals.forget(request_id)
        timer = asyncio.get_running_loop().call_later(RESERVE_S, self._expire, request_id)
        self.arrivals.waiting[request_id] = Incoming(dispatcher=dispatcher, timer=timer, loan=True)

    def follows(self, request_id: str) -> None:
        """The request itself is here: it does not wait for ever."""
        incoming = self.arrivals.waiting.get(request_id)
        if incoming is not None:
            incoming.timer.cancel()
            loop = asyncio.get_running_loop()
            incoming.timer = loop.call_later(WAIT_S, self._expire, request_id)

    async def land(self, request_id: str, references: Sequence[Any]) -> bool:
        """Groups have come. False: no more of this request are wanted."""
        return await self.take(request_id, references) is Taken.ALL

    async def take(self, request_id: str, references: Sequence[Any]) -> Taken:
        """Check groups that have come, and hand what is whole to the engine."""
        stage = self.arrivals.stage
        for reference in references:
            began = time.monotonic()
            try:
                header, assembly = await asyncio.to_thread(stage, request_id, reference)
            except CameBefore:
                self.count("groups_twice")
                continue
            except NotExpected:
                self.count("groups_late")
                return Taken.UNWANTED
            except Exception as error:  # noqa: BLE001 - whatever it is, the prompt is computed
                await self.give_up(request_id, getattr(error, "reason", "broken"))
                return Taken.WRONG
            self.count("groups_received")
            self.count("bytes_received", bytes_of(header))
            self.count("seconds_receiving", time.monotonic() - began)
            outcome = await self._note(request_id, header, assembly)
            if outcome is not Taken.ALL:
                return outcome
        return Taken.ALL

    async def give_up(self, request_id: str, reason: str = "") -> None:
        """Wait no longer. `reason` counts if something was waited for."""
        prefix = self._prefix(request_id)
        self.arrivals.forget(request_id)
        try:
            dropped = await self._ask(lambda engine: engine.give_up(request_id))
        except (ConnectionRefusedError, TimeoutError):
            return  # nothing waits in an engine that has ended
        if dropped and reason:
            self.count(f"{prefix}_{reason}")
            log.warning("the KV of %s is given up: %s", request_id, reason)

    def leave(self, dispatcher: str) -> None:
        """That dispatcher is gone, and with it its requests."""
        for name, incoming in list(self.arrivals.waiting.items()):
            if incoming.dispatcher == dispatcher:
                self._begin(self.give_up(name))

    def close(self) -> None:
        """Its engine and its workers are gone, and what they held."""
        for name in list(self.arrivals.waiting):
            self.arrivals.forget(name)
        for name in list(self._outgoing):
            self.stop_sending(name)
        for task in self._tasks:
            task.cancel()

    async def _note(self, request_id: str, header: GroupHeader, assembly: Assembly) -> Taken:
        """A group was right and is staged; if its run is complete the engine gets it."""
        if assembly.over:
            return Taken.UNWANTED
        if not assembly.add(header):
            return Taken.ALL
        arrival = KvArrival(
            request_id=request_id,
            epoch=header.epoch,
            first=header.first,
            end=header.end,
            slot=assembly.slot,
            salt=bytes.fromhex(header.salt),
            digest=bytes.fromhex(header.digest),
        )
        count, assembly.count = assembly.count, 0  # the engine's now
        outcome = await self._ask(lambda engine: engine.landed(arrival))
        if outcome is Landing.LANDED:
            self.count("runs_landed")
            return Taken.ALL
        self._ends.discard(assembly.slot, count)
        if outcome in WRONG:
            self.count(f"{self._prefix(request_id)}_{outcome}")
            return Taken.WRONG
        self.count("groups_late")
        return Taken.UNWANTED

    def _prefix(self, request_id: str) -> str:
        """How the reasons are named for which it is computed."""
        return "loan_failed" if self.arrivals.is_loan(request_id) else "fallback"

    def _expire(self, request_id: str) -> None:
        if request_id in self.arrivals.waiting:
            self._begin(self.give_up(request_id, "timeout"))

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def count(self, name: str, amount: float = 1) -> None:
        """One more, or so many."""
        self.counts[name] = self.counts.get(name, 0) + amount
