"""A run of the whole system under virtual time: real engines, admission, routers; no hardware.

    workload ──> dispatchers (Admission, Router) ── link ──> replicas (Engine, cost model)
                       ^                                          │
                       └──────────── items, heartbeats ───────────┘

What decides is what serves: `fabric.core`'s objects, called by the verbs and in the order that
`cluster/` calls them. Replaced are workers (`costs`), links, and clients. Same plan, same arrivals,
same outcome, on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from fabric.config.parts import HEADROOM_STEPS
from fabric.core.configs import (
    AdmissionConfig,
    AutoscalerConfig,
    PairingConfig,
    RouterConfig,
)
from fabric.core.journal import Recorder
from fabric.core.request import Request
from fabric.core.traffic.handoff import PREFILL
from fabric.sim.clock import NS_PER_MS, NS_PER_S, Clock
from fabric.sim.costs import DEMO_CPU, Profile
from fabric.sim.dispatcher import Dispatcher, Network
from fabric.sim.fleet import Fleet
from fabric.sim.leases import Leases
from fabric.sim.records import Outcome, Sample, Timeline
from fabric.sim.scaling import Scaling

DECODE = "decode"
FAST_NEWS_NS = 100 * NS_PER_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is simulated. `replicas` are ready at time 0; others need `cold_start_ns`.

    `router` None: head-room of two steps, as the ingress sets it. `autoscaler` None: the number of
    replicas stays. `check_every`: machines are checked after so many events (None: never; it is
    slow). `lean`: what a long run can't keep is dropped, prompts of requests that are over and the
    snapshots in samples. `news_ns`: decode steps that are all alike become one event, and what is
    new of them reaches dispatchers so late at most (None: every step is an event of its own).
    `prefill`: a pool beside those `replicas`, which then are the decode pool.
    """

    profile: Profile = DEMO_CPU
    replicas: int = 1
    dispatchers: int = 1
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    router: RouterConfig | None = None
    network: Network = field(default_factory=Network)
    cold_start_ns: int = 4 * NS_PER_S
    autoscaler: AutoscalerConfig | None = None
    prefill: PrefillPool | None = None
    check_every: int | None = None
    news_ns: int | None = None
    lean: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPool:
    """Replicas that compute prompts for the others, and what their engines are like. Which prompts:
    `pairing`."""

    replicas: int
    profile: Profile
    pairing: PairingConfig = field(default_factory=PairingConfig)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request as its client knows it. `output`: after so many tokens the model stops by itself
    (None: only at max_tokens). `leaves_ns`: so long after its arrival the client goes away."""

    request: Request
    output: int | None = None
    leaves_ns: int | None = None


class Simulation:
    """Build it, add controllers with `every`, `run` it once."""

    def __init__(self, plan: Plan, arrivals: Iterable[Request | Arrival]) -> None:
        if plan.replicas < 0 or plan.dispatchers < 1:
            raise ValueError("a simulation needs at least one dispatcher and no negative replicas")
        if plan.prefill is not None and plan.autoscaler is not None:
            raise ValueError("pools don't scale by themselves")
        self.plan = plan
        self.clock = Clock()
        self.outcome = Outcome()
        self.lengths: dict[int, int] = {}
        self.fleet = Fleet(plan.profile, self.clock, self.lengths, plan.cold_start_ns)
        self.fleet.news_ns = plan.news_ns
        step_tokens = plan.profile.engine.step_tokens
        router = plan.router or RouterConfig(headroom_tokens=HEADROOM_STEPS * step_tokens)
        pairing = None if plan.prefill is None else plan.prefill.pairing
        configs = (plan.admission, router, pairing)
        self.dispatchers = [
            Dispatcher(f"d{index}", self.clock, plan.network, configs, plan.dispatchers)
            for index in range(plan.dispatchers)
        ]
        for one in self.dispatchers:
            one.on_ended.append(self._ended)
            one.holds_when_cold = plan.autoscaler is not None and not plan.autoscaler.min_replicas
        if plan.dispatchers > 1:
            self.every(NS_PER_S, Leases(plan.admission, self.dispatchers).turn)
        self.scaling: Scaling | None = None
        if plan.autoscaler is not None:
            self.scaling = Scaling(plan.autoscaler, self.fleet, self.outcome)
            self.scaling.wanted = plan.replicas
            self.every(NS_PER_S, self._scale)
        self._arrivals: Iterator[Request | Arrival] = iter(arrivals)
        self._under_way = 0  # arrived and not ended
        self._number = 0
        self._exhausted = False

    def watch(self, journal: Recorder) -> None:
        """Every decision is written down from now on; before `run`."""
        self.fleet.journal = journal
        for one in self.dispatchers:
            one.admission = journal.watch(f"{one.name}.admission", one.admission)
            one.router = journal.watch(f"{one.name}.router", one.router)
        if self.scaling is not None:
            self.scaling.autoscaler = journal.watch("autoscaler", self.scaling.autoscaler)

    def every(self, period_ns: int, call: Callable[[int], None]) -> None:
        """Call with `now` again and again, from one period on: a controller's turn."""
        self.clock.after(period_ns, self._again, period_ns, call)

    def run(
        self, until_ns: int | None = None, *, enough: Callable[[], bool] | None = None
    ) -> Outcome:
        """Let it happen: until then, until it is `enough`, or until the last request has ended."""
        if self.plan.prefill is None:
            self.fleet.start(self.plan.replicas)
        else:
            self.fleet.profiles[PREFILL] = self.plan.prefill.profile
            self.fleet.start(self.plan.prefill.replicas, PREFILL)
            self.fleet.start(self.plan.replicas, DECODE)
        for dispatcher in self.dispatchers:
            for replica in self.fleet.ready():  # a server is ready once every front knows them all
                dispatcher.meet(replica)
                dispatcher.heard(replica.snapshot)
            self._heartbeat(dispatcher)
        self.clock.after(0, self._sample)
        self._next_arrival()
        clock, every, over = self.clock, self.plan.check_every, enough or (lambda: self.over)
        while (when := clock.next_at()) is not None:
            if (when > until_ns) if until_ns is not None else over():
                break
            clock.step()
            self.outcome.events += 1
            if every and self.outcome.events % every == 0:
                self.check()
        self.outcome.ended = clock.now if until_ns is None else until_ns
        self.outcome.replica_ns = self.fleet.replica_ns(self.outcome.ended)
        self._note_engines()
        if self.plan.prefill is not None:
            self._note_handovers()
        return self.outcome

    def settle(self, for_ns: int) -> None:
        """Let what is on its way arrive, after a run."""
        until = self.clock.now + for_ns
        while (when := self.clock.next_at()) is not None and when <= until:
            self.clock.step()

    def check(self) -> None:
        """Every machine's own check, and no request is lost between them."""
        self.fleet.check()
        for dispatcher in self.dispatchers:
            dispatcher.check()
        if self.scaling is not None:
            self.scaling.autoscaler.check()
        known = sum(d.admission.queued_requests + d.open_requests for d in self.dispatchers)
        assert known == self._under_way, "a request is nowhere, or twice"

    @property
    def over(self) -> bool:
        """Nobody comes any more, and nobody is under way."""
        return self._exhausted and not self._under_way

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is None:
            self._exhausted = True
            return
        if isinstance(arrival, Request):
            arrival = Arrival(request=arrival)
        self._number += 1
        request = arrival.request
        if not request.sampling.seed:  # the gateway gives every request one; here it is the name
            sampling = replace(request.sampling, seed=self._number)
            request = replace(request, sampling=sampling)
        if arrival.output is not None:
            self.lengths[request.sampling.seed] = arrival.output
        there = request.arrival + self.plan.profile.front_ns
        self.clock.at(there, self._arrive, request, arrival.leaves_ns)

    def _arrive(self, request: Request, leaves_ns: int | None) -> None:
        timeline = Timeline(request=request, prompt_tokens=len(request.prompt))
        self.outcome.timelines.append(timeline)
        self._under_way += 1
        dispatcher = self.dispatchers[len(self.outcome.timelines) % len(self.dispatchers)]
        dispatcher.offer(timeline)
        if leaves_ns is not None:
            self.clock.after(leaves_ns, dispatcher.leave, request.request_id)
        self._next_arrival()

    def _scale(self, now: int) -> None:
        assert self.scaling is not None, "asked without an autoscaler"
        self.scaling.decide(self.dispatchers, now)

    def _ended(self, timeline: Timeline, _: int) -> None:
        self._under_way -= 1
        if self.plan.lean:
            timeline.request = replace(timeline.request, prompt=())

    def _again(self, period_ns: int, call: Callable[[int], None]) -> None:
        call(self.clock.now)
        self.clock.after(period_ns, self._again, period_ns, call)

    def _heartbeat(self, dispatcher: Dispatcher) -> None:
        """Ask every replica; those that answer for the first time become known."""
        link_ns = dispatcher.link_ns
        for replica in self.fleet.ready():
            dispatcher.meet(replica)
            self.clock.after(2 * link_ns, dispatcher.heard, replica.snapshot)
        dispatcher.release()
        self.clock.after(dispatcher.network.heartbeat_ns, self._heartbeat, dispatcher)

    def _sample(self) -> None:
        stages = self.fleet.count()
        self.outcome.samples.append(
            Sample(
                at=self.clock.now,
                ready=stages.ready,
                starting=stages.starting,
                draining=stages.draining,
                queued_requests=sum(d.admission.queued_requests for d in self.dispatchers),
                queued_tokens=sum(d.admission.queued_tokens for d in self.dispatchers),
                snapshots=()
                if self.plan.lean
                else tuple(one.snapshot for one in self.fleet.ready()),
            )
        )
        self.clock.after(NS_PER_S, self._sample)

    def _note_handovers(self) -> None:
        counts = self.outcome.handovers
        for dispatcher in self.dispatchers:
            for event, count in dispatcher.handovers.items():
                counts[event.value] = counts.get(event.value, 0) + count
        porters = [one.porter for one in self.fleet.replicas.values()]
        counts["bytes"] = sum(one.sent_bytes for one in porters)
        counts["lost_groups"] = sum(one.lost_groups for one in porters)

    def _note_engines(self) -> None:
        preempted: dict[int, int] = {}
        for replica in self.fleet.replicas.values():
            for seed, count in replica.worker.preempted.items():
                preempted[seed] = preempted.get(seed, 0) + count
        for timeline in self.outcome.timelines:
            timeline.preemptions = preempted.get(timeline.request.sampling.seed, 0)
