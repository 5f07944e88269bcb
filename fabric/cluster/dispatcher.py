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
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

from fabric.cluster.control import Control
from fabric.cluster.detour import Detours
from fabric.cluster.fleet import dispatchers, fleet_status, fleet_text
from fabric.cluster.link import Calls, Link, Lost, NotSent
from fabric.cluster.processes import processes_of
from fabric.cluster.replicas import Replicas
from fabric.cluster.reports import DispatcherReport, encode_dispatcher
from fabric.cluster.slo_report import slo_status, slo_text
from fabric.cluster.wake_up import WakeUp
from fabric.cluster.watch import Watch, refused
from fabric.core.configs import AdmissionConfig, DegradeConfig, PairingConfig, RouterConfig
from fabric.core.errors import Failed, Overloaded, Unavailable
from fabric.core.journal import Recorder, watched
from fabric.core.request import Request, TokenChunk
from fabric.core.traffic.admission import Admission, Shed
from fabric.core.traffic.handoff import Pairing, capacity
from fabric.core.traffic.journey import Broken, GivenUp
from fabric.core.traffic.quarantine import Quarantine
from fabric.core.traffic.release import release
from fabric.core.traffic.router import Router
from fabric.gateway.backend import Readiness, ServedModel, Service
from fabric.gateway.counters import GatewayCounters

HEARTBEAT_S = 1.0

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
    pairing: PairingConfig | None = None  # where prompts and outputs have pools of their own


class Dispatcher:
    """See `gateway.backend.Backend`. `status` shows the processes below `launcher_pid` (None: on a
    cluster); what is decided here goes into the `journal`."""

    def __init__(
        self,
        calls: Calls,
        *,
        identity: str,
        model: ServedModel,
        policy: Policy,
        launcher_pid: int | None,
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
        seed, pools = crc32(identity.encode()), policy.pairing
        self._pairing: Pairing | None = None
        self._router: Router | Pairing
        if pools is not None:
            pairing = Pairing(pools, policy.router, seed=seed)
            self._router = self._pairing = watched(journal, "router", pairing)
        else:
            self._router = watched(journal, "router", Router(policy.router, seed=seed))
        self._detours = Detours()
        self._launcher_pid = launcher_pid
        self._replicas = Replicas(calls, self, lambda: encode_dispatcher(self._own()))
        self._quarantine = Quarantine()
        self._turns: dict[str, asyncio.Future[str]] = {}  # queued: resolves to a replica id
        self._where: dict[str, Link] = {}
        self._watches: dict[str, Watch] = {}  # queued or sent
        self._report = DispatcherReport(dispatcher_id=identity)
        self._wake_up = WakeUp(calls, self._refresh)
        self._draining = False
        self._beating: asyncio.Task[None] | None = None

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
        return 1 if self._replicas.cold() else len(self._replicas.live())

    def drain(self) -> int:
        """Take no new requests; returns how many are still open."""
        self._draining = True
        return len(self._watches)

    def model(self) -> ServedModel:
        """The model, with the context that its replicas have room for. Raises `Unavailable`."""
        limit = self._replicas.find_context_limit()
        if limit is None:
            raise Unavailable("The model is loading.")
        return replace(self._model, context_limit=limit)

    async def stream(self, request: Request) -> AsyncIterator[tuple[TokenChunk, ...]]:
        """All chunks of a request. Closing the iterator aborts it.

        A replica that is lost costs a pause: it goes on elsewhere from what was sent. Raises
        `Failed` where the request itself is to blame."""
        self._count(
            arrived_requests_total=self._report.arrived_requests_total + 1,
            arrived_tokens_total=self._report.arrived_tokens_total + len(request.prompt),
        )
        watch = await self._offer(request)
        try:
            while not watch.journey.done:
                async with aclosing(self._attempt(watch)) as items:
                    async for chunks in items:
                        yield chunks
            if rest := watch.journey.rest():
                yield rest
        except (Unavailable, Failed):
            self._count(failed_total=self._report.failed_total + 1)
            self._control.observe(watch.outcome(), time.time_ns())
            raise
        finally:
            self._over(watch)

    async def _attempt(self, watch: Watch) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        """As far as it gets on one replica."""
        name = watch.request.request_id
        try:
            link = await self._turn(watch)
            journey = watch.journey
            prefill = self._replicas.links.get(watch.prefill_id or "")
            run = self._detours.run(journey, prefill, link, watch.fetch)
            async with aclosing(run) as items:
                async for chunks in items:
                    news = journey.note(chunks)
                    if any(chunk.tokens for chunk in news):
                        if self._quarantine.proven(name):
                            self._release()  # others may have waited for that
                        if watch.prefill_id is not None:  # drew it; the others come from here
                            watch.prefill_id = None
                            self._quarantine.sent(name, link.replica_id)
                    watch.note(news, time.time_ns())
                    yield news
        except (Lost, Broken) as loss:
            self._lose(watch, loss)

    def _lose(self, watch: Watch, loss: Exception) -> None:
        """Back into the queue, in the same place. Raises what it can't be done for."""
        name = watch.request.request_id
        self._where.pop(name, None)
        self._quarantine.left(name)
        if name in self._quarantine.guilty:
            self._count(poisoned_total=self._report.poisoned_total + 1)
            log.error("request %s is refused: replicas died under it", name)
            raise Failed(f"Request {name} can't be served: engines broke under it repeatedly.")
        verdict = watch.journey.lost()
        log.warning("request %s goes on elsewhere: %s", name, loss or type(loss).__name__)
        if isinstance(verdict, GivenUp):
            raise Unavailable(f"The request was lost {verdict.attempts} times in a row.")
        if not isinstance(loss, NotSent):
            self._count(resumed_total=self._report.resumed_total + 1)
        if not watch.journey.done:
            resumed = replace(watch.journey.outgoing(), request_id=name)
            self._admission.requeue(resumed, time.time_ns())

    def died(self, replica_id: str, at_work: Collection[str] | None) -> None:
        """See `link.Listener`."""
        if at_work is not None:
            names = {watch.journey.name: name for name, watch in self._watches.items()}
            at_work = [names[one] for one in at_work if one in names]
        self._quarantine.died(replica_id, at_work)

    def news(self) -> None:
        """See `link.Listener`."""
        self._release()

    def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice of a request."""
        watch, link = self._watches.get(request_id), self._where.get(request_id)
        if watch is None:
            return
        watch.over.add(choice)
        watch.journey.stop(choice)
        if link is not None:  # else it waits to go on, without this choice
            link.abort_choice(watch.journey.name, choice)

    def service(self, request_id: str) -> Service | None:
        """How an open request is served."""
        watch, link = self._watches.get(request_id), self._where.get(request_id)
        return watch.service(link.replica_id) if watch is not None and link is not None else None

    async def readiness(self) -> Readiness:
        """Can a token be generated?"""
        if self._draining:
            return Readiness(ready=False, reason="shutting down")
        if self._replicas.live() or self._replicas.cold():
            return Readiness(ready=True)
        return Readiness(ready=False, reason=self._replicas.why_none())

    async def metrics_text(self) -> str:
        """Prometheus text of the fleet, as of now."""
        await self._refresh()
        scaling = await asyncio.to_thread(self._calls.scaling)
        text = fleet_text(self._model.name, self._replicas.reports(), self._own(), scaling)
        return text + slo_text(
            self._control.slo, dispatchers(self._replicas.reports(), self._own())
        )

    async def fleet_status(self) -> dict[str, object]:
        """What `fabric status` shows."""
        await self._refresh()
        # Reading every process's memory map takes milliseconds that streams should not wait for.
        pid = self._launcher_pid
        processes = await asyncio.to_thread(processes_of, pid) if pid is not None else []
        readiness = await self.readiness()
        scaling = await asyncio.to_thread(self._calls.scaling)
        found = fleet_status(
            self._model, readiness, self._replicas.reports(), self._own(), processes
        )
        slo = slo_status(self._control.slo, self._admission.degradation.why)
        return found | {"scaling": scaling, "slo": slo}

    async def _offer(self, request: Request) -> Watch:
        """Into the queue. Raises `Overloaded` or `Unavailable`."""
        if self._draining:
            raise Unavailable("The server is shutting down.")
        replicas = self._replicas
        if not replicas.live() and not replicas.cold() and not await self._found():
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
            replica_id = await turn
        finally:
            del self._turns[name]
        link = self._replicas.links.get(replica_id)
        if link is None:  # lost between its choice and our waking up
            raise NotSent(replica_id)
        self._where[name] = link
        return link

    def _over(self, watch: Watch) -> None:
        """However it ended, in the queue or on a replica: it makes room."""
        name, now = watch.request.request_id, time.time_ns()
        self._where.pop(name, None)
        self._watches.pop(name, None)
        self._quarantine.forget(name)
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
        if self._replicas.cold():
            self._wake_up.knock()
        self._tell_pools()  # one that has just come must not get what is not for it
        snapshots = [
            link.snapshot
            for link in self._replicas.live()
            if not self._quarantine.tests(link.replica_id)
        ]
        for request, choice in release(self._admission, self._router, snapshots, now):
            name = request.request_id
            watch, turn = self._watches.get(name), self._turns.get(name)
            if watch is None or turn is None or turn.done():  # its client has just left
                continue
            watch.goes(request, choice, now)
            first = choice.prefill_id or choice.replica_id
            self._quarantine.sent(name, first)
            if self._quarantine.tests(first):
                snapshots[:] = [one for one in snapshots if one.replica_id != first]
            turn.set_result(choice.replica_id)

    async def _found(self) -> bool:
        """A replica that came since the last heartbeat: in an update the one before may have left
        in the same second. The beat in hand may be older than that, so a second one."""
        for _ in range(2):
            await self._refresh()
            if self._replicas.live():
                return True
        return False

    async def _keep_beating(self) -> None:
        while True:
            await self._refresh()
            try:
                self._replicas.drop_lost()
                self._control.turn(
                    dispatchers(self._replicas.reports(), self._own()), time.time_ns()
                )
                self._release()
            except Exception:  # without heartbeats the replicas would free our work
                log.exception("looking after the queue failed")
            await asyncio.sleep(HEARTBEAT_S)

    async def _refresh(self) -> None:
        await self._replicas.refresh()
        self._tell_pools()
        live = [link.snapshot for link in self._replicas.live()]
        kinds = self._pairing.kinds if self._pairing is not None else {}
        self._admission.capacity = capacity(live, kinds)

    def _tell_pools(self) -> None:
        if self._pairing is not None:
            kinds = {one.snapshot.replica_id: one.pool for one in self._replicas.reports()}
            if self._pairing.kinds != kinds:  # a journal would be full of it
                self._pairing.kinds = kinds

    def _count(self, **totals: Any) -> None:
        self._report = replace(self._report, **totals)

    def _own(self) -> DispatcherReport:
        return replace(
            self._report,
            queued_requests=self._admission.queued_requests,
            queued_tokens=self._admission.queued_tokens,
            open_requests=len(self._where),
            open_handovers=self._detours.under_way,
            series=tuple({**self.counters.samples(), **self._detours.samples()}.items()),
            queued_by_tier=self._admission.queued_by_tier(),
            **self._control.fields(time.time_ns()),
        )
