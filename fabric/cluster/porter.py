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
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

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


@dataclass(slots=True, kw_only=True)
class Assembly:
    """The groups of one run of positions: of every layer and head before it counts."""

    slot: int
    count: int  # of slots that are to be cleared
    under_way: int = 0  # groups that another thread is putting into them
    over: bool = False  # nobody wants it: whoever is under way clears the slots afterwards
    claimed: set[tuple[int, int]] = field(default_factory=set)  # staged, or about to be
    cells: set[tuple[int, int]] = field(default_factory=set)  # staged


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A prompt that is on its way here."""

    dispatcher: str
    timer: asyncio.TimerHandle
    runs: dict[tuple[int, int, int], Assembly] = field(default_factory=dict)


class NotExpected(Exception):
    """Nobody waits for this group."""


class CameBefore(Exception):
    """All of this group is here: workers that share KV heads send the same, and calls repeat."""


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
        self._incoming: dict[str, Incoming] = {}
        self._next_slot = 0
        self._lock = threading.Lock()

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
                self._count("groups_unwanted")
                self._ends.drop(export)
                continue
            lane = self._lanes.setdefault(outgoing.target, Lane())
            if lane.groups == GROUPS_WAITING:
                self._count("groups_dropped")
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
            self._count("groups_sent", len(references))
            async with asyncio.timeout(LAND_TIMEOUT_S):
                if not await self._peer(outgoing.target, name, references):
                    self._stop(name, outgoing)
        except Exception as error:  # noqa: BLE001 - the other side does without
            self._count("groups_failed")
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
        self._forget(name)
        timer = asyncio.get_running_loop().call_later(RESERVE_S, self._expire, name)
        # Before the engine answers: groups may come meanwhile, and the engine takes them after it.
        self._incoming[name] = Incoming(dispatcher=dispatcher, timer=timer)
        try:
            outcome = await self._ask(lambda engine: engine.reserve(request, epoch))
        except BaseException:  # who asked has left; the engine may hear of it all the same
            self._forget(name)
            self._begin(self.give_up(name))
            raise
        if not isinstance(outcome, Accepted):
            self._forget(name)
            self._count("fallback_no_room")
            return False
        return True

    def follows(self, request_id: str) -> None:
        """The request itself is here: it does not wait for ever."""
        incoming = self._incoming.get(request_id)
        if incoming is not None:
            incoming.timer.cancel()
            loop = asyncio.get_running_loop()
            incoming.timer = loop.call_later(WAIT_S, self._expire, request_id)

    async def land(self, request_id: str, references: Sequence[Any]) -> bool:
        """Groups have come. False: no more of this request are wanted."""
        for reference in references:
            began = time.monotonic()
            try:
                header, assembly = await asyncio.to_thread(self._stage, request_id, reference)
            except CameBefore:
                self._count("groups_twice")
                continue
            except NotExpected:
                self._count("groups_late")
                return False
            except Exception as error:  # noqa: BLE001 - whatever it is, the prompt is computed
                await self.give_up(request_id, getattr(error, "reason", "broken"))
                return False
            self._count("groups_received")
            self._count("bytes_received", _bytes_of(header))
            self._count("seconds_receiving", time.monotonic() - began)
            if not await self._note(header, assembly):
                return False
        return True

    async def give_up(self, request_id: str, reason: str = "") -> None:
        """Wait no longer. `reason` counts if something was waited for."""
        self._forget(request_id)
        try:
            dropped = await self._ask(lambda engine: engine.give_up(request_id))
        except (ConnectionRefusedError, TimeoutError):
            return  # nothing waits in an engine that has ended
        if dropped and reason:
            self._count(f"fallback_{reason}")
            log.warning("the KV of %s is given up: %s", request_id, reason)

    def leave(self, dispatcher: str) -> None:
        """That dispatcher is gone, and with it its requests."""
        for name, incoming in list(self._incoming.items()):
            if incoming.dispatcher == dispatcher:
                self._begin(self.give_up(name))

    def close(self) -> None:
        """Its engine and its workers are gone, and what they held."""
        for name in list(self._incoming):
            self._forget(name)
        for name in list(self._outgoing):
            self.stop_sending(name)
        for task in self._tasks:
            task.cancel()

    def _stage(self, request_id: str, reference: Any) -> tuple[GroupHeader, Assembly]:
        """Another thread, which goes on even if who waits for it is cancelled."""
        claimed: list[Assembly] = []

        def slot_of(header: GroupHeader) -> int:
            """Where a group goes whose checksum is right."""
            with self._lock:
                claimed.append(self._claim(request_id, header))
            return claimed[0].slot

        try:
            header = self._ends.arrive(reference, slot_of)
        finally:
            with self._lock:
                for assembly in claimed:
                    assembly.under_way -= 1
                    self._clear(assembly)
        return header, claimed[0]

    def _claim(self, request_id: str, header: GroupHeader) -> Assembly:
        incoming = self._incoming.get(request_id)
        key = (header.epoch, header.first, header.end)
        if incoming is None or header.request_id != request_id:
            raise NotExpected
        count = -(-(header.end - header.first) // header.page)
        assembly = incoming.runs.get(key)
        if assembly is None:
            assembly = incoming.runs[key] = Assembly(slot=self._next_slot, count=count)
            self._next_slot += count
        cells = _cells(header)
        if cells <= assembly.claimed:
            raise CameBefore
        assembly.claimed |= cells
        assembly.under_way += 1
        return assembly

    def _clear(self, assembly: Assembly) -> None:
        """With the lock: its slots, once nobody wants them and nobody fills them."""
        if assembly.over and not assembly.under_way:
            self._ends.discard(assembly.slot, assembly.count)

    async def _note(self, header: GroupHeader, assembly: Assembly) -> bool:
        """A group was right and is staged; if its run is complete the engine gets it."""
        if assembly.over:
            return False
        assembly.cells |= _cells(header)
        if len(assembly.cells) < header.part.all_layers * header.part.all_heads:
            return True
        arrival = KvArrival(
            request_id=header.request_id,
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
            self._count("runs_landed")
            return True
        self._ends.discard(assembly.slot, count)
        self._count(f"fallback_{outcome}" if outcome in WRONG else "groups_late")
        return False

    def _expire(self, request_id: str) -> None:
        if request_id in self._incoming:
            self._begin(self.give_up(request_id, "timeout"))

    def _forget(self, request_id: str) -> None:
        """Clear what is staged and not the engine's."""
        with self._lock:
            incoming = self._incoming.pop(request_id, None)
            if incoming is None:
                return
            incoming.timer.cancel()
            for assembly in incoming.runs.values():
                assembly.over = True
                self._clear(assembly)

    def _begin(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _count(self, name: str, amount: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + amount


def _cells(header: GroupHeader) -> set[tuple[int, int]]:
    """The (layer, head) pairs of a group."""
    part = header.part
    return set(product(range(*part.layers), range(*part.heads)))


def _bytes_of(header: GroupHeader) -> int:
    layers, heads = header.part.layers, header.part.heads
    element = 4 if header.dtype == "float32" else 2
    rows = (layers[1] - layers[0]) * 2 * (heads[1] - heads[0])
    return rows * (header.end - header.first) * header.head_dim * element
