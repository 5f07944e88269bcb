"""One dispatcher: the real `Admission` and `Router`, called as `cluster.dispatcher` calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

from fabric.core.configs import AdmissionConfig, RouterConfig
from fabric.core.request import Finish, Request
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission, Shed
from fabric.core.traffic.release import release
from fabric.core.traffic.router import Router
from fabric.core.traffic.speed import capacity_of
from fabric.sim.clock import NS_PER_MS, NS_PER_S, Clock
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


class Dispatcher:
    """Admits, chooses, sends, and takes the tokens in."""

    def __init__(
        self,
        name: str,
        clock: Clock,
        network: Network,
        configs: tuple[AdmissionConfig, RouterConfig],
        dispatchers: int = 1,
    ) -> None:
        self.name = name
        self.clock = clock
        self.network = network
        self.link_ns = network.link_ns
        self.admission = Admission(configs[0], dispatchers=dispatchers)
        self.router = Router(configs[1], seed=crc32(name.encode()))
        self.arrived_requests = 0
        self.arrived_tokens = 0
        self.admitted = 0
        self.shed = 0
        self.views: dict[str, ReplicaSnapshot] = {}
        self.holds_when_cold = False  # with scale to zero a request waits for a replica to start
        self.on_ended: list[Callable[[Timeline, int], None]] = []
        self._replicas: dict[str, Replica] = {}
        self._looked: dict[str, int] = {}
        self._open: dict[str, tuple[Timeline, int]] = {}  # request id -> (record, choices left)
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
        elif request_id in self._open:
            timeline, _ = self._open.pop(request_id)
            timeline.refusal = "the client left"
            replica = self._replicas.get(timeline.replica or "")
            if replica is not None:
                self.clock.after(self.link_ns, replica.abort, request_id)
            self._completed(timeline)

    def release(self) -> None:
        """Send on what has a replica with head-room; turn away what waited too long."""
        now = self.clock.now
        for request in self.admission.expire(now):
            timeline = self._queued.pop(request.request_id)
            self._refuse(timeline, "waited too long", self.admission.retry_after_s(now))
        views = tuple(self.views.values())
        for request, choice in release(self.admission, self.router, views, now):
            self._send(request, choice.replica_id)

    def meet(self, replica: Replica) -> None:
        """A heartbeat was answered for the first time."""
        self._replicas[replica.name] = replica

    def heard(self, snapshot: ReplicaSnapshot) -> None:
        """A heartbeat's answer has arrived. One that is draining is not listened to."""
        replica = self._replicas.get(snapshot.replica_id)
        if replica is not None and replica.stage is Stage.READY:
            self._note(snapshot)
            self.admission.capacity = capacity_of(tuple(self.views.values()))

    def lose(self, replica_id: str) -> None:
        """The replica takes no new requests (any more); its tokens still come."""
        self.views.pop(replica_id, None)

    def receive(self, item: Item) -> None:
        """Tokens and the state of a replica."""
        now = self.clock.now
        ended = []
        for chunk in item.chunks:
            found = self._open.get(chunk.request_id)
            if found is None:
                continue
            timeline, left = found
            if chunk.tokens:
                timeline.first = now if timeline.first is None else timeline.first
                timeline.last = now
                timeline.tokens += len(chunk.tokens)
            if chunk.cached_tokens is not None:
                timeline.cached_tokens = chunk.cached_tokens
            if chunk.finish is not None:
                left -= 1
                self._open[chunk.request_id] = (timeline, left)
                if not left:
                    timeline.finish = chunk.finish
                    ended.append(timeline)
        for request_id, reason in item.refused:
            timeline, _ = self._open.pop(request_id)
            self.admission.completed(timeline.request, now, tokens=0, finished=False)
            self._refuse(timeline, reason, None)
        self._look(item.snapshot)
        for timeline in ended:
            del self._open[timeline.request.request_id]
            self._completed(timeline)

    def check(self) -> None:
        """The machines' own, and each admitted request is in one place."""
        self.admission.check()
        self.router.check()
        assert self.admission.queued_requests == len(self._queued), "two views of the queue"
        assert not self._queued.keys() & self._open.keys(), "queued and sent"
        assert all(left > 0 for _, left in self._open.values()), "ended, and still open"

    def _send(self, request: Request, replica_id: str) -> None:
        timeline = self._queued.pop(request.request_id)
        timeline.routed, timeline.replica = self.clock.now, replica_id
        self._open[request.request_id] = (timeline, request.sampling.n)
        replica = self._replicas[replica_id]
        self.clock.after(self.link_ns, self._arrive, replica, timeline)

    def _arrive(self, replica: Replica, timeline: Timeline) -> None:
        """At the replica, if it is still there: else the request goes back into the queue."""
        if timeline.request.request_id not in self._open:
            return  # its client left on the way
        if replica.stage is Stage.READY:
            replica.submit(timeline.request, self)
            return
        self.lose(replica.name)
        del self._open[timeline.request.request_id]
        self.admission.completed(timeline.request, self.clock.now, tokens=0, finished=False)
        timeline.routed = timeline.replica = None
        self._queue(timeline, self.clock.now)

    def _look(self, snapshot: ReplicaSnapshot) -> None:
        now, network = self.clock.now, self.network
        if snapshot.replica_id not in self.views:
            return  # draining
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
