"""One dispatcher: the real `Admission` and `Router`, called as `cluster.dispatcher` calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast
from zlib import crc32

from fabric.core.configs import AdmissionConfig, PairingConfig, RouterConfig
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission, Shed
from fabric.core.traffic.handoff import Event, Pairing, capacity
from fabric.core.traffic.handoff import Stage as Stages
from fabric.core.traffic.journey import GivenUp, Journey
from fabric.core.traffic.quarantine import Quarantine
from fabric.core.traffic.release import release
from fabric.core.traffic.router import Choice, Router
from fabric.sim.clock import NS_PER_MS, NS_PER_S, Clock
from fabric.sim.detour import Detour
from fabric.sim.records import Timeline
from fabric.sim.replica import Item, Replica, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Between dispatchers and replicas. `link_ns`: one way. `heartbeat_ns`: how often a dispatcher
    asks every replica (so it hears of new ones, and from those where it has nothing open).

    Staleness, beyond what the link costs: snapshots that come with tokens are looked at once in
    `snapshot_period_ns` only, and `snapshot_delay_ns` late.
    """

    link_ns: int = NS_PER_MS // 2
    heartbeat_ns: int = NS_PER_S
    snapshot_period_ns: int = 0
    snapshot_delay_ns: int = 0


@dataclass(slots=True, kw_only=True)
class Open:
    """A request on a replica: its record, and what its client has of it. `at`: where it is, or is
    on its way to; `detour`: from one pool to another."""

    timeline: Timeline
    journey: Journey
    at: Replica
    detour: Detour | None = None


class Dispatcher:
    """Admits, chooses, sends, and takes the tokens in."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        configs: tuple[AdmissionConfig, RouterConfig, PairingConfig | None],
        dispatchers: int = 1,
    ) -> None:
        self.name = name
        self.clock = clock
        self.network = network
        self.link_ns = network.link_ns
        self.admission = Admission(configs[0], dispatchers=dispatchers)
        seed = crc32(name.encode())
        self.router: Router | Pairing
        if configs[2] is None:
            self.router = Router(configs[1], seed=seed)
        else:
            self.router = Pairing(configs[2], configs[1], seed=seed)
        self.handovers: dict[Event, int] = {}  # by what happened
        self.arrived_requests = 0
        self.arrived_tokens = 0
        self.admitted = 0
        self.shed = 0
        self.views: dict[str, ReplicaSnapshot] = {}
        self.holds_when_cold = False  # with scale to zero a request waits for a replica to start
        self.on_ended: list[Callable[[Timeline, int], None]] = []
        self._replicas: dict[str, Replica] = {}
        self.on_chunks: list[Callable[[Timeline, tuple[TokenChunk, ...]], None]] = []
        self.wire: Callable[[str], int] = lambda _: network.link_ns  # replica -> delay, one way
        self.deaf_until = 0  # until then news of replicas does not arrive
        self.quarantine = Quarantine()
        self._deaths = 0
        self._attempts = 0
        self._pools: dict[str, str] | None = None if configs[2] is None else {}
        self._looked: dict[str, int] = {}
        self._open: dict[str, Open] = {}  # by the name under which it went out
        self._journeys: dict[str, Journey] = {}  # by the request's own; of those sent at least once
        self._queued: dict[str, Timeline] = {}

    @property
    def open_requests(self) -> int:
        """Sent to a replica and not ended."""
        return len(self._open)

    def offer(self, timeline: Timeline) -> None:
        """A request has arrived."""
        now = self.clock.now
        request = timeline.request
        timeline.dispatcher, timeline.arrived = self.name, now
        self.arrived_requests += 1
        self.arrived_tokens += len(request.prompt)
        self._queue(timeline, now)

    def _queue(self, timeline: Timeline, now: int) -> None:
        request = timeline.request
        if not self.views and not self.holds_when_cold:
            self._refuse(timeline, "not ready", None)
            return
        outcome = self.admission.offer(request, now)
        if isinstance(outcome, Shed):
            self._refuse(timeline, outcome.reason, outcome.retry_after_s)
            return
        self.admitted += 1
        for other in outcome.displaced:
            gone = self._queued.pop(other.request_id)
            self._refuse(gone, "displaced", self.admission.retry_after_s(now))
        self._queued[request.request_id] = timeline
        self.release()

    def leave(self, request_id: str) -> None:
        """The client has gone away."""
        timeline = self._queued.pop(request_id, None)
        if timeline is not None:
            self.admission.cancel(request_id, self.clock.now)
            timeline.refusal = "the client left"
            self._forget(timeline)
            return
        journey = self._journeys.get(request_id)
        if journey is not None and journey.name in self._open:
            one = self._open.pop(journey.name)
            timeline = one.timeline
            timeline.refusal = "the client left"
            self._tell_detour(one, Event.CLOSED)
            if one.at.name in self._replicas:
                self.clock.after(self.wire(one.at.name), one.at.abort, journey.name)
            self._forget(timeline)
            self._completed(timeline)

    def release(self) -> None:
        """Send on what has a replica with head-room; turn away what waited too long."""
        now = self.clock.now
        for request in self.admission.expire(now):
            timeline = self._queued.pop(request.request_id)
            self._refuse(timeline, "waited too long", self.admission.retry_after_s(now))
        views = [
            view
            for name, view in self.views.items()
            if not self._deaths or not self.quarantine.tests(name)
        ]
        for request, choice in release(self.admission, self.router, views, now):
            self._send(request, choice)
            first = choice.prefill_id or choice.replica_id
            if self._deaths and self.quarantine.tests(first):
                views[:] = [one for one in views if one.replica_id != first]

    def meet(self, replica: Replica) -> None:
        """A heartbeat was answered for the first time."""
        self._replicas[replica.name] = replica
        if self._pools is not None and replica.name not in self._pools:
            self._pools[replica.name] = replica.pool
            cast("Pairing", self.router).kinds = dict(self._pools)  # or what watches it

    def heard(self, snapshot: ReplicaSnapshot) -> None:
        """A heartbeat's answer has arrived. One that is draining is not listened to."""
        replica = self._replicas.get(snapshot.replica_id)
        if self.clock.now < self.deaf_until:
            return
        if replica is not None and replica.stage is Stage.READY:
            self._note(snapshot)
            self.admission.capacity = capacity(tuple(self.views.values()), self._pools or {})

    def lose(self, replica_id: str) -> None:
        """The replica takes no new requests (any more); its tokens still come."""
        self.views.pop(replica_id, None)

    def lost(self, replica_id: str) -> None:
        """It is dead, or nothing was heard of it for too long: what it had goes on elsewhere."""
        self._deaths += 1
        self.lose(replica_id)
        self._replicas.pop(replica_id, None)
        mine = {name: one for name, one in self._open.items() if one.at.name == replica_id}
        self.quarantine.died(replica_id)
        for name, one in mine.items():
            del self._open[name]
            self._again(one)
        self.release()

    def receive(self, item: Item) -> None:
        """Tokens and the state of a replica."""
        now = self.clock.now
        ended = []
        for said in item.chunks:
            found = self._open.get(said.request_id)
            if found is None:
                continue
            timeline, journey, detour = found.timeline, found.journey, found.detour
            if detour is not None and found.at.name != item.replica_id:
                continue  # the first leg is over
            chunk = said if detour is None else detour.first(said)
            news = journey.take(chunk)
            if chunk.tokens:
                timeline.first = now if timeline.first is None else timeline.first
                timeline.last = now
                timeline.tokens += len(chunk.tokens)
                self.quarantine.proven(timeline.request.request_id)
            if chunk.cached_tokens is not None and not journey.losses:
                timeline.cached_tokens = chunk.cached_tokens
            if timeline.begun is None:
                timeline.begun = chunk.begun
            for call in self.on_chunks:
                call(timeline, () if news is None else (news,))
            if chunk.finish is not None and journey.done:
                timeline.finish = chunk.finish
                ended.append(chunk.request_id)
                self._tell_detour(found, Event.ENDED)
            elif detour is not None and detour.sampled:
                self._tell_detour(found, Event.SAMPLED)
        for name, reason in item.refused:
            if name in self._open and self._open[name].at.name == item.replica_id:
                self._tell_detour(self._open[name], Event.CLOSED)
                timeline = self._open.pop(name).timeline
                self.admission.completed(timeline.request, now, tokens=0, finished=False)
                self._refuse(timeline, reason, None)
        self._look(item.snapshot)
        for name in ended:
            timeline = self._open.pop(name).timeline
            self._forget(timeline)
            self._completed(timeline)

    def check(self) -> None:
        """The machines' own, and each admitted request is in one place."""
        self.admission.check()
        self.router.check()
        assert self.admission.queued_requests == len(self._queued), "two views of the queue"
        self.quarantine.check()
        sent = [one.timeline.request.request_id for one in self._open.values()]
        assert not self._queued.keys() & set(sent), "queued and sent"
        assert self._journeys.keys() >= set(sent), "sent, and nobody knows what came of it"
        assert all(not one.journey.done for one in self._open.values()), "ended, and still open"
        for journey in self._journeys.values():
            journey.check()

    def _send(self, request: Request, choice: Choice) -> None:
        timeline = self._queued.pop(request.request_id)
        timeline.routed = self.clock.now if timeline.routed is None else timeline.routed
        journey = self._journeys.setdefault(request.request_id, Journey(request))
        replica = self._replicas[choice.replica_id]
        one = Open(timeline=timeline, journey=journey, at=replica)
        self._open[journey.name] = one
        if choice.prefill_id is None:
            self._go(one, replica)
            return
        self._attempts += 1
        pair = (self._replicas[choice.prefill_id], replica)
        one.detour = Detour(self, journey.outgoing(), pair, self._attempts)
        self._tell_detour(one, Event.BEGAN)

    def _go(self, one: Open, replica: Replica) -> None:
        """To a replica, for all of it or for a leg."""
        one.at = replica
        one.timeline.replica = replica.name
        self.quarantine.sent(one.timeline.request.request_id, replica.name)
        self.clock.after(self.wire(replica.name), self._arrive, replica, one.journey.name)

    def _tell_detour(self, one: Open, event: Event) -> None:
        """Of what happened to it, if it is on one."""
        if one.detour is None or one.detour.handoff.stage is Stages.OVER:
            return
        self.note_handover(event)
        if one.detour.advance(event):
            self._go(one, one.detour.at)

    def note_handover(self, event: Event) -> None:
        """One more."""
        self.handovers[event] = self.handovers.get(event, 0) + 1

    def _arrive(self, replica: Replica, name: str) -> None:
        """At the replica, if it is still there: else the request goes back into the queue."""
        found = self._open.get(name)
        if found is None or found.at is not replica:
            return  # its client left on the way, or the replica was given up
        if replica.stage is Stage.READY:
            leg = (found.journey.outgoing(), None) if found.detour is None else found.detour.leg()
            replica.submit(leg[0], self, leg[1])
            return
        self.lose(replica.name)
        del self._open[name]
        self._again(found)
        self.release()

    def _again(self, one: Open) -> None:
        """Back into the queue, in the same place, with what its client has; as the cluster's."""
        timeline, journey, now = one.timeline, one.journey, self.clock.now
        name = timeline.request.request_id
        self.quarantine.left(name)
        timeline.losses += 1
        if one.detour is not None:
            first = one.detour.handoff.stage is Stages.PREFILL
            self._tell_detour(one, Event.PREFILL_LOST if first else Event.DECODE_LOST)
        reason = ""
        if name in self.quarantine.guilty:
            reason = "engines broke under it"
        elif isinstance(verdict := journey.lost(), GivenUp):
            reason = f"lost {verdict.attempts} times in a row"
        if reason:
            self.admission.completed(timeline.request, now, tokens=timeline.tokens, finished=False)
            self._refuse(timeline, reason, None)
            return
        self.admission.requeue(replace(journey.outgoing(), request_id=name), now)
        self._queued[name] = timeline

    def _forget(self, timeline: Timeline) -> None:
        """It is over."""
        name = timeline.request.request_id
        self._journeys.pop(name, None)
        self.quarantine.forget(name)

    def _look(self, snapshot: ReplicaSnapshot) -> None:
        now, network = self.clock.now, self.network
        if snapshot.replica_id not in self.views or now < self.deaf_until:
            return  # draining, or news does not come through
        if now - self._looked.get(snapshot.replica_id, -NS_PER_S) < network.snapshot_period_ns:
            return
        self._looked[snapshot.replica_id] = now
        if network.snapshot_delay_ns:
            self.clock.after(network.snapshot_delay_ns, self.heard, snapshot)
        else:
            self._note(snapshot)

    def _note(self, snapshot: ReplicaSnapshot) -> None:
        known = self.views.get(snapshot.replica_id)
        if known is None or snapshot.taken > known.taken:
            self.views[snapshot.replica_id] = snapshot
            self.release()

    def _refuse(self, timeline: Timeline, reason: str, retry_after_s: float | None) -> None:
        self.shed += 1
        self._forget(timeline)
        timeline.refusal, timeline.retry_after_s = reason, retry_after_s
        self._tell(timeline)

    def _completed(self, timeline: Timeline) -> None:
        self.admission.completed(
            timeline.request,
            self.clock.now,
            tokens=timeline.tokens,
            finished=timeline.finish in (Finish.STOP, Finish.LENGTH),
        )
        if timeline.tpot_ns is not None:
            self.admission.pace.add(timeline.tpot_ns / NS_PER_S)
        self._tell(timeline)
        self.release()

    def _tell(self, timeline: Timeline) -> None:
        for call in self.on_ended:
            call(timeline, self.clock.now)
