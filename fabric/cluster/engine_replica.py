"""One engine behind Ray Serve: its workers, the engine that plans its steps, the loop between them.

Calls from a dispatcher (see `dispatcher.py`), all on this replica's asyncio loop:

    generate(request)   open for the request's life; cancelling it aborts the request
    steps()             one stream a dispatcher: every engine step sends one item with its tokens
    heartbeat()         once a second: renews the lease, brings back a `ReplicaReport`
    abort_choice()      the text held a stop string
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fabric.cluster.asking import ask
from fabric.cluster.calls import peer_of
from fabric.cluster.engine_loop import Command, EngineLoop, Step
from fabric.cluster.loading import EngineParts
from fabric.cluster.loans import Loans
from fabric.cluster.local_stream import listen
from fabric.cluster.measures import Measures
from fabric.cluster.outbox import Outbox
from fabric.cluster.porter import Porter
from fabric.cluster.rebuilds import Rebuilds
from fabric.cluster.reports import ReplicaReport, decode_dispatcher, encode_replica
from fabric.cluster.scaling import BURN, NUMBERS, QUEUE
from fabric.cluster.wire import decode_request
from fabric.core.engine.borrowing import KvWish
from fabric.core.engine.engine import Engine
from fabric.core.engine.plan import KvExport
from fabric.core.request import Finish, TokenChunk
from fabric.core.traffic.fetching import Fetch

LEASE_S = 3.0
# Serve sends no heartbeats to a replica that it takes down: its requests go on while their
# dispatcher's process visibly lives.
LEAVING_LEASE_S = 60.0
STREAM_IDLE_S = 1.0
HOUSEKEEPING_S = 0.5
# A step takes 0.4 s at most; a process that was not scheduled for a while is not stuck yet.
STUCK_S = 15.0
# The engine thread asks for the interpreter after every step: don't let it wait for 5 ms.
SWITCH_INTERVAL_S = 0.0005

log = logging.getLogger("ray.serve")


# Gives the replica its id and its engine; raises what keeps it from being served.
Load = Callable[[], tuple[str, EngineParts]]


class EngineReplica:
    """The deployment class (without a word of Ray: see `loading.Loader`).

    `sockets`: a folder for the short way of the stream, to dispatchers on this machine. `pool`: its
    kind; `peer`: how a prefill replica calls those of the decode pool, or one that lends its own.
    """

    def __init__(
        self,
        load: Load,
        sockets: Path | None = None,
        pool: str = "mixed",
        peer: Any = None,
    ) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        began = time.monotonic()
        self._load = load
        self.replica_id, self.parts = load()
        self._load_s = time.monotonic() - began
        self._rebuilds = Rebuilds()
        self._mending: asyncio.Task[None] | None = None
        self.measures = Measures()
        self._boxes: dict[str, Outbox] = {}
        self._owner: dict[str, Outbox] = {}
        self._asyncio_loop: asyncio.AbstractEventLoop | None = None
        self._housekeeper: asyncio.Task[None] | None = None
        self._socket = sockets / self.replica_id if sockets else None
        self._listener: asyncio.Task[asyncio.AbstractServer] | None = None
        self.pool = pool
        self.porter: Porter | None = None
        self.loans: Loans | None = None
        self._peer = peer_of(peer)
        self.loop = self._start_loop()

    async def generate(
        self,
        data: bytes,
        dispatcher: str,
        target: str | None = None,
        epoch: int = 0,
        fetch: Fetch | None = None,
    ) -> None:
        """Run a request; returns when its last choice has finished. Tokens travel on `steps`.

        `target`: its prompt's KV goes to that replica, as attempt `epoch`. `fetch`: its prefix
        comes from another one."""
        self._attach()
        if self._problem() is not None:  # it is being replaced
            raise ConnectionRefusedError("the engine has ended")
        request = decode_request(data)
        box = self._box(dispatcher)
        done = box.open(request)
        self._owner[request.request_id] = box
        self.measures.began(request, time.time_ns())
        name = request.request_id
        if self.porter is not None and target is not None:
            self.porter.send_to(name, target)
            self.loop.submit(
                Command(request=request, ask=lambda engine: engine.export(name, epoch))
            )
        else:
            if self.porter is not None:
                self.porter.follows(name)
            if self.loans is not None and fetch is not None:
                self.loop.submit(self.loans.borrow(request, fetch, dispatcher))
            else:
                self.loop.submit(Command(request=request))
        try:
            await done
            if self.porter is not None:
                await self.porter.sent(name)
        except BaseException:  # refused, or its client left
            # Not at a good end: the last group is still to come.
            if self.porter is not None:
                self.porter.stop_sending(name)
            raise
        finally:
            self._owner.pop(request.request_id, None)
            if box.opened.pop(request.request_id, None) is not None:
                self._abort(request.request_id)

    async def reserve(self, data: bytes, dispatcher: str, epoch: int) -> bool:
        """A prompt's KV will come. False: no room for it."""
        self._attach()
        assert self.porter is not None, "a replica without a pool"
        return await self.porter.reserve(decode_request(data), epoch, dispatcher)

    async def land(self, request_id: str, references: list[Any]) -> bool:
        """KV has come, from a prefill replica. False: it is not wanted (any more)."""
        self._attach()
        assert self.porter is not None, "a replica without a pool"
        return await self.porter.land(request_id, references)

    async def give_up(self, request_id: str, reason: str) -> None:
        """No KV will come, and perhaps nothing else of a request."""
        if self.porter is not None:
            await self.porter.give_up(request_id, reason)

    async def lend(self, wish: KvWish) -> list[Any]:
        """Another replica wishes for a prefix: references to what is here of it."""
        self._attach()
        assert self.loans is not None, "a replica that lends nothing"
        return await self.loans.lend(wish)

    async def withdraw(self, wish: KvWish) -> None:
        """What another replica got for it was lost, or wrong."""
        if self.loans is not None:
            self.loans.withdraw(wish)

    async def steps(self, dispatcher: str) -> AsyncIterator[bytes]:
        """The dispatcher's stream of `StepItem`s; ends when its lease does."""
        self._attach()
        async for item in self._box(dispatcher).items():
            yield item

    async def heartbeat(self, dispatcher: str, report: bytes) -> bytes:
        """Renew the lease; returns a `ReplicaReport`."""
        self._attach()
        box = self._box(dispatcher)
        box.idle_s = 0.0
        box.report = decode_dispatcher(report)
        return encode_replica(self._report())

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Serve: what its autoscaling policy gets to see of this replica and the queue."""
        snapshot = self.loop.snapshot
        reports = [box.report for box in self._boxes.values() if box.report is not None]
        own = {name: float(getattr(snapshot, name)) for name in NUMBERS}
        queue = {name: float(sum(getattr(one, name) for one in reports)) for name in QUEUE}
        worst = {name: max((getattr(one, name) for one in reports), default=0.0) for name in BURN}
        return own | queue | worst

    async def awake(self) -> None:
        """Nothing: whoever gets an answer knows that a replica is there."""

    async def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice: its text held a stop string. Its last chunk says Finish.ABORT."""
        self.measures.ended(request_id, choice, Finish.STOP, time.time_ns())
        self.loop.submit(Command(abort=request_id, choice=choice))

    async def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that raises."""
        problem = self._problem()
        if problem is not None and not self._rebuilds.under_way:
            raise RuntimeError(f"the engine loop ended: {problem}")
        if self.loop.overdue():
            raise RuntimeError(f"a step has been running for {self.loop.stuck_s():.0f} s")

    def _problem(self) -> str | None:
        """Why nothing can be generated here any more; known of workers even while none is asked."""
        return self.loop.error or self.parts.workers.problem()

    def _start_loop(self) -> EngineLoop:
        parts = self.parts
        if parts.kv_ends is not None:
            counts: dict[str, float] = {}
            if self.porter is not None:
                self.porter.close()
                counts = self.porter.counts
            self.porter = Porter(parts.kv_ends, self._ask, self._peer, counts)
            if self.loans is not None:
                self.loans.close()
            if parts.lending is not None:
                ends = parts.kv_ends
                self.loans = Loans(parts.lending, self.porter, ends, self._ask, self._peer)
        loop = EngineLoop(
            self.replica_id,
            parts.engine,
            parts.workers,
            self._post,
            step_deadline_s=parts.step_deadline_s,
            depart=self._depart,
        )
        loop.start()
        return loop

    async def _rebuild(self, problem: str) -> None:
        """New workers and a new engine in the old one's place: Serve would take much longer, and a
        group has its place on the machines already. What was open here goes on by itself."""
        log.warning("the engine is made anew: %s", problem)
        try:
            _, self.parts = await asyncio.to_thread(self._load_again)
            self.measures.begin_anew()
            self.loop = self._start_loop()
        except Exception:  # whatever kept it from loading: Serve replaces a replica that is red
            log.exception("the engine could not be made anew")
            self._rebuilds.stop()
        finally:
            self._rebuilds.under_way = False

    def _load_again(self) -> tuple[str, EngineParts]:
        self.loop.stop()
        self.parts.stop()
        return self._load()

    def _attach(self) -> None:
        """Remember the loop we serve on: the constructor may run on another one."""
        if self._asyncio_loop is None:
            self._asyncio_loop = asyncio.get_running_loop()
            self._housekeeper = self._asyncio_loop.create_task(self._keep_house())
            if self._socket is not None:
                self._listener = self._asyncio_loop.create_task(
                    listen(self._socket, self._over_socket)
                )

    async def _over_socket(self, dispatcher: str) -> AsyncIterator[bytes]:
        """`steps`, for a reader whose end is seen at once."""
        box = self._box(dispatcher)
        box.sockets += 1
        try:
            async for item in box.items():
                yield item
        finally:
            box.sockets -= 1

    def _box(self, dispatcher: str) -> Outbox:
        box = self._boxes.get(dispatcher)
        if box is None:
            box = self._boxes[dispatcher] = Outbox(dispatcher)
        return box

    async def _ask(self, verb: Callable[[Engine], Any]) -> Any:
        """The engine's answer, between two of its steps. Raises what the verb raises, and
        `ConnectionRefusedError` where nobody would answer."""
        if self._problem() is not None:
            raise ConnectionRefusedError("the engine has ended")
        return await ask(self.loop, verb)

    def _depart(self, exports: tuple[KvExport, ...]) -> None:
        """Engine thread: KV lies ready to be handed over."""
        if self.porter is not None and self._asyncio_loop is not None:
            self._asyncio_loop.call_soon_threadsafe(self.porter.depart, exports)

    def _post(self, step: Step) -> None:
        """Engine thread: hand the step to the asyncio thread, with one callback."""
        if self._asyncio_loop is not None and not self._asyncio_loop.is_closed():
            self._asyncio_loop.call_soon_threadsafe(self._deliver, step)

    def _deliver(self, step: Step) -> None:
        for request_id, reason in step.refused:
            self.measures.forget(request_id)
            if request_id in self._owner:
                self._owner[request_id].refuse(request_id, reason)
        self.measures.produced(step.chunks, step.ended)
        if step.error is not None:
            step.chunks.extend(self._failed(step.at_work))
        for chunk in step.chunks:
            box = self._owner.get(chunk.request_id)
            if box is not None:
                box.put(chunk)
        for box in self._boxes.values():
            if box.opened or box.has_chunks():
                box.flush(step.snapshot)

    def _failed(self, at_work: tuple[str, ...] | None) -> list[TokenChunk]:
        """A last chunk for every open request: who was in the step that failed, and who was not.
        The dispatcher lets them go on elsewhere."""
        return [
            TokenChunk(
                request_id=request_id,
                choice=0,
                position=0,
                tokens=(),
                finish=Finish.ERROR if at_work is None or request_id in at_work else Finish.ABORT,
            )
            for request_id, box in self._owner.items()
            if request_id in box.opened
        ]

    def _abort(self, request_id: str) -> None:
        self.measures.forget(request_id)
        if self.porter is not None:
            self.porter.stop_sending(request_id)
        self.loop.submit(Command(abort=request_id))

    async def _keep_house(self) -> None:
        """Leases and rates. Time in which this loop itself stood still counts against nobody."""
        before = time.monotonic()
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            now = time.monotonic()
            elapsed, before = min(now - before, 2 * HOUSEKEEPING_S), now
            self.measures.sample(self.loop.snapshot, time.time_ns())
            problem = self._problem()
            if problem is not None and self._rebuilds.allowed(now):
                self._rebuilds.begin(now, hung=self.loop.hung)
                self._mending = asyncio.create_task(self._rebuild(problem))
            for box in list(self._boxes.values()):
                box.idle_s += elapsed
                box.quiet_s += elapsed
                if box.idle_s > (LEAVING_LEASE_S if box.sockets else LEASE_S):
                    self._expire(box)
                elif box.quiet_s > STREAM_IDLE_S and not box.opened:
                    box.hang_up()

    def _expire(self, box: Outbox) -> None:
        if box.opened:
            log.warning(
                "dispatcher %s is gone: freeing %d requests", box.dispatcher, len(box.opened)
            )
        del self._boxes[box.dispatcher]
        if self.porter is not None:
            self.porter.leave(box.dispatcher)
        for request_id in list(box.opened):
            self._owner.pop(request_id, None)
            self._abort(request_id)
        box.close()

    def _report(self) -> ReplicaReport:
        prompt_rate, generated_rate = self.measures.rates()
        stuck_s = self.loop.stuck_s()
        return ReplicaReport(
            snapshot=self.loop.latest(),
            stuck_s=stuck_s if stuck_s > STUCK_S else 0.0,
            error=self._problem(),
            executor=self.parts.executor,
            context_limit=self.parts.context_limit,
            weight_bytes=self.parts.weight_bytes,
            kv_pool_bytes=self.parts.kv_pool_bytes,
            host_pool_bytes=self.parts.host_pool_bytes,
            prompt_tokens_per_s=prompt_rate,
            generated_tokens_per_s=generated_rate,
            load_s=self._load_s,
            pid=os.getpid(),
            histograms=tuple(one.report() for one in self.measures.histograms.values()),
            finished=tuple(sorted(self.measures.finished.items())),
            dispatchers=tuple(box.report for box in self._boxes.values() if box.report is not None),
            shards=self.parts.workers.shards(),
            rebuilds_total=self._rebuilds.total,
            hangs_total=self._rebuilds.hung,
            pool=self.pool,
            handover=tuple(sorted(self.porter.counts.items())) if self.porter else (),
        )
