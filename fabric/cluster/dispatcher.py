"""The gateway's `Backend`: admits, chooses a replica, and brings the tokens back.

    stream(request): admission.offer ──> waits its turn ──> router.choose ──> link.run ──> chunks
                         │ Shed                │ too long          │ no head-room: stays queued
                         └─> Overloaded        └─> Overloaded      └─> asked again at the next news

It lives in the ingress process, on its asyncio loop. Decisions are `core.traffic`'s.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

from fabric.cluster.control import Control
from fabric.cluster.fleet import dispatchers, fleet_status, fleet_text
from fabric.cluster.link import Calls, Link, NotSent
from fabric.cluster.processes import processes_of
from fabric.cluster.reports import (
    DispatcherReport,
    ReplicaReport,
    decode_replica,
    encode_dispatcher,
)
from fabric.cluster.slo_report import slo_status, slo_text
from fabric.cluster.wake_up import WakeUp
from fabric.cluster.watch import Watch, refused
from fabric.core.attainment import worst_burn
from fabric.core.configs import AdmissionConfig, DegradeConfig, RouterConfig
from fabric.core.errors import Overloaded, Unavailable
from fabric.core.journal import Recorder, watched
from fabric.core.request import Request, TokenChunk
from fabric.core.traffic.admission import Admission, Shed
from fabric.core.traffic.release import release
from fabric.core.traffic.router import Router
from fabric.core.traffic.speed import capacity_of
from fabric.gateway.backend import Readiness, ServedModel
from fabric.gateway.counters import GatewayCounters

HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 2.0
# A replica that has not answered for this long gets no new requests ...
SILENT_S = 5.0
# ... and after this long what it holds is given up. Serve notices a dead process much sooner.
LOST_S = 30.0
# How often a request that met a leaving replica is sent again.
ATTEMPTS = 4

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a dispatcher decides. `dispatchers`: how many share tenants' limits; `objective`: the
    share of requests that is promised to meet its targets."""

    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    dispatchers: int = 1
    objective: float = 0.99
    degrade: DegradeConfig = field(default_factory=DegradeConfig)


class Dispatcher:
    """See `gateway.backend.Backend`. `status` shows the processes below `launcher_pid`; what is
    decided here goes into the `journal`."""

    def __init__(
        self,
        calls: Calls,
        *,
        identity: str,
        model: ServedModel,
        policy: Policy,
        launcher_pid: int,
        journal: Recorder | None = None,
    ) -> None:
        self.counters = GatewayCounters()
        self._calls = calls
        self._identity = identity
        self._model = model
        admission = Admission(policy.admission, dispatchers=policy.dispatchers)
        self._admission = watched(journal, "admission", admission)
        self._control = Control(
            identity,
            self._admission,
            policy.degrade,
            objective=policy.objective,
            dispatchers=policy.dispatchers,
            journal=journal,
        )
        router = Router(policy.router, seed=crc32(identity.encode()))
        self._router = watched(journal, "router", router)
        self._launcher_pid = launcher_pid
        self._links: dict[str, Link] = {}
        self._turns: dict[str, asyncio.Future[str]] = {}  # queued: resolves to a replica id
        self._where: dict[str, Link] = {}
        self._watches: dict[str, Watch] = {}  # queued or sent
        self._report = DispatcherReport(dispatcher_id=identity)
        self._context_limit: int | None = None  # of any replica that was ever there
        self._wake_up = WakeUp(calls, self._refresh)
        self._draining = False
        self._beating: asyncio.Task[None] | None = None
        self._beat: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for replicas. On the loop that will serve."""
        if self._calls.cold_starts:
            self._wake_up.knock()  # a front that is new at zero replicas knows nothing of the model
        # Outside of any HTTP request's context: Serve would end the task with the request.
        self._beating = asyncio.get_running_loop().create_task(
            self._keep_beating(), context=contextvars.Context()
        )

    def replicas_seen(self) -> int:
        """How many replicas could get a request now; at zero, the one that would be started."""
        return 1 if self._cold() else len(self._live())

    def drain(self) -> int:
        """Take no new requests; returns how many are still open."""
        self._draining = True
        return len(self._watches)

    def model(self) -> ServedModel:
        """The model, with the context that its replicas have room for. Raises `Unavailable`."""
        limits = [link.report.context_limit for link in self._links.values() if link.report]
        if limits:
            self._context_limit = min(limits)
        if self._context_limit is None:
            raise Unavailable("The model is loading.")
        return replace(self._model, context_limit=self._context_limit)

    async def stream(self, request: Request) -> AsyncIterator[tuple[TokenChunk, ...]]:
        """All chunks of a request. Closing the iterator aborts it."""
        self._count(
            arrived_requests_total=self._report.arrived_requests_total + 1,
            arrived_tokens_total=self._report.arrived_tokens_total + len(request.prompt),
        )
        for attempt in range(1, ATTEMPTS + 1):
            try:
                async with aclosing(self._attempt(request)) as items:
                    async for chunks in items:
                        yield chunks
            except NotSent:  # the replica was just leaving: back into the queue, in the same place
                if attempt == ATTEMPTS:
                    raise
            else:
                return

    async def _attempt(self, request: Request) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        watch = await self._offer(request)
        try:
            link = await self._turn(watch)
            async with aclosing(link.run(watch.request)) as items:
                async for chunks in items:
                    watch.note(chunks, time.time_ns())
                    yield chunks
        except NotSent:
            raise
        except Unavailable:
            self._count(failed_total=self._report.failed_total + 1)
            self._control.observe(watch.outcome(), time.time_ns())
            raise
        finally:
            self._over(watch)

    def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice of a request."""
        link = self._where.get(request_id)
        if link is not None:
            self._watches[request_id].stopped += 1
            link.abort_choice(request_id, choice)

    def degraded(self, request_id: str) -> str | None:
        """In what an open request gets less than it asked for."""
        watch = self._watches.get(request_id)
        return watch.degraded or None if watch is not None else None

    async def readiness(self) -> Readiness:
        """Can a token be generated?"""
        if self._draining:
            return Readiness(ready=False, reason="shutting down")
        if self._live() or self._cold():
            return Readiness(ready=True)
        reports = [link.report for link in self._links.values() if link.report is not None]
        if any(report.error for report in reports):
            return Readiness(ready=False, reason="the engine failed and is being replaced")
        if any(report.stuck_s for report in reports):
            return Readiness(ready=False, reason="the engine is stuck in a step")
        return Readiness(ready=False, reason="loading" if not reports else "no replica answers")

    async def metrics_text(self) -> str:
        """Prometheus text of the fleet, as of now."""
        await self._refresh()
        scaling = await asyncio.to_thread(self._calls.scaling)
        text = fleet_text(self._model.name, self._reports(), self._own(), scaling)
        return text + slo_text(self._control.slo, dispatchers(self._reports(), self._own()))

    async def fleet_status(self) -> dict[str, object]:
        """What `fabric status` shows."""
        await self._refresh()
        # Reading every process's memory map takes milliseconds that streams should not wait for.
        processes = await asyncio.to_thread(processes_of, self._launcher_pid)
        readiness = await self.readiness()
        scaling = await asyncio.to_thread(self._calls.scaling)
        found = fleet_status(self._model, readiness, self._reports(), self._own(), processes)
        slo = slo_status(self._control.slo, self._admission.degradation.why)
        return found | {"scaling": scaling, "slo": slo}

    # -- a request's way to a replica ------------------------------------------------------------

    async def _offer(self, request: Request) -> Watch:
        """Into the queue. Raises `Overloaded` or `Unavailable`."""
        if self._draining:
            raise Unavailable("The server is shutting down.")
        if not self._live() and not self._cold():
            raise Unavailable(f"Not ready: {(await self.readiness()).reason}.")
        now = time.time_ns()
        outcome = self._admission.offer(request, now)
        if isinstance(outcome, Shed):
            self._count(shed_total=self._report.shed_total + 1)
            if not outcome.own_limit:
                self._control.observe(refused(request), now)
            raise Overloaded(f"Turned away: {outcome.reason}.", retry_after_s=outcome.retry_after_s)
        self._count(admitted_total=self._report.admitted_total + 1)
        for other in outcome.displaced:
            self._turn_away(other, "More important requests took its place in the queue.", now)
        return Watch(request, outcome.degraded)

    async def _turn(self, watch: Watch) -> Link:
        """Wait in the queue; the link to the replica that has room."""
        name = watch.request.request_id
        turn: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._turns[name] = turn
        self._watches[name] = watch
        try:
            self._release()
            link = self._links.get(await turn)
        finally:
            del self._turns[name]
        if link is None:  # lost between its choice and our waking up
            raise NotSent("The replica is gone.", retry_after_s=1.0)
        self._where[name] = link
        return link

    def _over(self, watch: Watch) -> None:
        """However it ended, in the queue or on a replica: it makes room."""
        name, now = watch.request.request_id, time.time_ns()
        self._where.pop(name, None)
        self._watches.pop(name, None)
        if not self._admission.cancel(name, now):
            self._admission.completed(
                watch.request, now, tokens=watch.tokens, finished=watch.finished
            )
        if watch.finished:
            self._control.observe(watch.outcome(), now)
            pace = watch.tpot_s()
            if pace is not None:
                self._admission.pace.add(pace)
        self._release()

    def _turn_away(self, request: Request, sentence: str, now: int) -> None:
        """It waited, and now it is out of the queue."""
        self._count(shed_total=self._report.shed_total + 1)
        self._control.observe(refused(request), now)
        turn = self._turns.get(request.request_id)
        if turn is not None and not turn.done():  # else its client left in this very turn
            retry_after_s = self._admission.retry_after_s(now)
            turn.set_exception(Overloaded(sentence, retry_after_s=retry_after_s))

    def _release(self) -> None:
        """Send on what has a replica with head-room; turn away what waited too long."""
        now = time.time_ns()
        for request in self._admission.expire(now):
            self._turn_away(request, "The request waited too long in the queue.", now)
        if not self._admission.queued_requests:
            return
        if self._cold():
            self._wake_up.knock()
        snapshots = [link.snapshot for link in self._live()]
        for request, choice in release(self._admission, self._router, snapshots, now):
            name = request.request_id
            watch, turn = self._watches.get(name), self._turns.get(name)
            if watch is None or turn is None or turn.done():  # its client has just left
                continue
            watch.request, watch.sent = request, now
            turn.set_result(choice.replica_id)

    def _cold(self) -> bool:
        """No replica is there, none is broken, and one will be started for whoever asks."""
        if not self._calls.cold_starts or self._context_limit is None:
            return False
        return not any(self._calls.serving(name) for name in self._links)

    def _live(self) -> list[Link]:
        """Replicas that answer and whose loop turns."""
        oldest = time.monotonic() - SILENT_S
        return [
            link
            for link in self._links.values()
            if link.seen_s > oldest
            and not link.left
            and self._calls.serving(link.replica_id)
            and link.report
            and not link.report.stuck_s
            and not link.report.error
        ]

    # -- the fleet -------------------------------------------------------------------------------

    async def _keep_beating(self) -> None:
        while True:
            await self._refresh()
            try:
                self._drop_lost()
                self._control.turn(dispatchers(self._reports(), self._own()), time.time_ns())
                self._release()
            except Exception:  # without heartbeats the replicas would free our work
                log.exception("looking after the queue failed")
            await asyncio.sleep(HEARTBEAT_S)

    async def _refresh(self) -> None:
        """A heartbeat, or the one in hand; without an answer in time the last one counts."""
        if self._beat is None or self._beat.done():
            self._beat = asyncio.get_running_loop().create_task(
                self._heartbeat(), context=contextvars.Context()
            )
        await asyncio.wait([self._beat], timeout=HEARTBEAT_TIMEOUT_S)

    async def _heartbeat(self) -> None:
        own = encode_dispatcher(self._own())
        try:
            answers = await self._calls.heartbeat(own, HEARTBEAT_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - no replica yet, or none any more
            log.debug("no replica answers: %s", type(error).__name__)
            return
        for answer in answers:
            report = decode_replica(answer)
            replica_id = report.snapshot.replica_id
            link = self._links.get(replica_id)
            if link is None:
                link = self._links[replica_id] = Link(replica_id, self._calls, self._release)
            link.update(report, time.monotonic())
            self._context_limit = report.context_limit
        self._admission.capacity = capacity_of([link.snapshot for link in self._live()])

    def _drop_lost(self) -> None:
        now = time.monotonic()
        for replica_id, link in list(self._links.items()):
            silent_s = now - max(link.seen_s, link.heard_s)
            if silent_s > (LOST_S if link.opened else SILENT_S):
                del self._links[replica_id]
                link.close()

    def _reports(self) -> list[ReplicaReport]:
        return [link.report for link in self._links.values() if link.report is not None]

    def _count(self, **totals: Any) -> None:
        self._report = replace(self._report, **totals)

    def _own(self) -> DispatcherReport:
        minute, ten_minutes = worst_burn(self._control.slo)
        return replace(
            self._report,
            queued_requests=self._admission.queued_requests,
            queued_tokens=self._admission.queued_tokens,
            open_requests=len(self._where),
            burn_minute=minute,
            burn_ten_minutes=ten_minutes,
            series=tuple(self.counters.samples().items()),
            queued_by_tier=self._admission.queued_by_tier(),
            **self._control.fields(time.time_ns()),
        )
