"""The bounded queue before the engines: who waits, who is turned away, who is next.

    offer ─> within the tenant's limits? ─> in time? ─> room? ─> waits ── heads ─> take ─> completed
               │ 429, its own fault           │ 429       │ 429, or a cheaper one goes instead
               └─> Shed                       └─> Shed    └─> Shed

Next is the tier furthest behind its weighted share (`fair`), in it the tenant furthest behind, of
its requests the one that must start first (`lines`). So no tier and no tenant starves, and a tier
that asks for less than its share waits for nobody else's queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from fabric.core.configs import AdmissionConfig
from fabric.core.degradation import NOTHING, Degradation, degraded
from fabric.core.lease import Demand, Flow, Lease
from fabric.core.request import Request
from fabric.core.traffic.lengths import Lengths
from fabric.core.traffic.lines import Entry, Lines, starts_by
from fabric.core.traffic.room import Room
from fabric.core.traffic.service import Running, Service
from fabric.core.traffic.speed import BacklogSpeed, Capacity, DrainRate, TokenPace

NS_PER_S = 1_000_000_000
RETRY_S_MIN = 1.0
RETRY_S_UNMEASURED = 5.0  # nothing has completed yet: about as long as a replica takes to warm up


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The request waits; `ahead_tokens` are queued before it in its line. `displaced`: cheaper
    requests that had to leave the queue for it; they are to be told so. `degraded`: in a word what
    it does without, for its client; empty: nothing."""

    ahead_tokens: int
    displaced: tuple[Request, ...] = ()
    degraded: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shed:
    """Turned away. `retry_after_s`: when it could be taken, as far as that can be reckoned.

    `own_limit`: it broke its tenant's limit; there is capacity.
    """

    retry_after_s: float
    reason: str
    own_limit: bool = False


class Admission:
    """See above. The caller asks the router before it takes, and tells what came of it."""

    def __init__(self, config: AdmissionConfig, *, dispatchers: int = 1) -> None:
        if config.max_queued_requests < 1 or config.max_queued_tokens < 1:
            raise ValueError("the queue must hold at least one request and one token")
        self.config = config
        self.lengths = Lengths()
        self.pace = TokenPace()
        self.capacity = Capacity()
        self.degradation: Degradation = NOTHING  # what dispatchers obey, until told otherwise
        self._ranks = {tier.name: rank for rank, tier in enumerate(config.tiers)}
        self._lines = Lines(len(config.tiers))
        self._room = Room(config)
        self._running: dict[str, Running] = {}
        self._places = [0] * len(config.tiers)  # sequences that run, by tier
        self._speed = BacklogSpeed()
        self._drain = DrainRate()
        self.service = Service(config, dispatchers)

    @property
    def queued_requests(self) -> int:
        """How many wait."""
        return len(self._lines)

    @property
    def queued_tokens(self) -> int:
        """The sum of their `work_tokens`."""
        return self._lines.tokens

    def offer(self, request: Request, now: int) -> Admitted | Shed:
        """Queue a request, or turn it away. `ValueError`: its id is queued, or runs, already.

        A request alone in the queue is taken however long it is: shedding it could never end.
        """
        if request.request_id in self._lines or request.request_id in self._running:
            raise ValueError(f"request {request.request_id} is queued already")
        self._lapse(now)
        rank = self.rank(request)
        batch = self.config.tiers[-1].name
        request, note = degraded(request, self.degradation, batch=batch)
        entry = Entry(request, work_tokens(request), rank, self.lengths.estimate(request))
        meter = self.service.meter(request.tenant, now)
        meter.offered += 1
        spent = self._spent(entry)
        if (wait_s := meter.wait_s(spent, now)) > 0:
            return Shed(
                retry_after_s=max(RETRY_S_MIN, wait_s),
                reason="the limit of this key's tenant is reached",
                own_limit=True,
            )
        tier = self.config.tiers[rank]
        if tier.name in self.degradation.sheds:
            return self._shed(f"tier {tier.name} is not served now", now)
        self._place(entry, now)
        if (late_s := self._late_s(entry, now)) > 0:
            return Shed(
                retry_after_s=min(max(late_s, RETRY_S_MIN), self.config.queue_ttl_s),
                reason="the deadline can't be met",
            )
        leave = self._room.leave_for(entry, self._lines)
        if isinstance(leave, str):
            return self._shed(leave, now)
        for victim in leave:
            self._drop(victim, now)
        displaced = tuple(victim.request for victim in leave)
        line = self._lines.line(rank, request.tenant)
        ahead = 0 if line is None else line.ahead_of(entry.key)
        meter.spend(spent, now)
        entry.spent = spent
        self._lines.add(entry)
        self._speed.waits(now)
        self._sync(rank, request.tenant)
        return Admitted(ahead_tokens=ahead, displaced=displaced, degraded=note)

    def heads(self, now: int) -> list[Request]:
        """Who may be next: of each tier its first, the tier furthest behind first. They still wait.

        Overdue ones are passed over (`expire` collects them), and tenants and tiers that may not
        have more running now.
        """
        self._lapse(now)
        ranks = [rank for rank in self.service.tiers_in_order() if self._has_place(rank)]
        firsts = [self._first(rank, now) for rank in ranks]
        return [request for request in firsts if request is not None]

    def behind(self, head: Request, now: int) -> Iterator[Request]:
        """A head and all of its tier that may go before it, in order, until something is taken:
        its tenant's, and those of tenants that are not too far ahead of it (`Service`)."""
        rank = self.rank(head)
        return self._lines.waiting(rank, self.service.tenants_beside(rank), now)

    def _first(self, rank: int, now: int) -> Request | None:
        tenants = self.service.tenants_in_order(rank)
        return next(self._lines.waiting(rank, tenants, now), None)

    def expected_tokens(self, request_id: str) -> int | None:
        """How long the output of a request that waits will be, each choice; None: not here."""
        entry = self._lines.get(request_id)
        return None if entry is None else entry.expected.likely

    def served_as(self, request: Request) -> str | None:
        """The tier as which one of the `heads` is to be routed and run; None: as its own."""
        rank = self.rank(request)
        return self.config.tiers[0].name if rank and self.service.is_passed_over(rank) else None

    def take(self, request_id: str, now: int) -> Request:
        """Take out one of the `heads`: it has a replica. It is the request as it is served, with
        less than its client asked for if it was degraded. `ValueError`: it does not wait here."""
        entry = self._lines.get(request_id)
        if entry is None:
            raise ValueError(f"request {request_id} does not wait here")
        request, rank = entry.request, entry.rank
        served_as = self.served_as(request)
        if entry.offered < now:
            self._speed.released(entry.tokens, now)
        self._lines.remove(entry)
        charge = cost(entry.tokens, entry.expected.likely * request.sampling.n)
        self.service.charge(rank, request.tenant, charge)
        self.service.meter(request.tenant, now).running += 1
        self._places[rank] += request.sampling.n
        self._running[request_id] = Running(
            request=request, rank=rank, charged=charge, tokens=entry.spent
        )
        self._left(request.tenant)
        # In its own line a tenant has placed it where it wants it; it goes before nobody else's.
        priority = max(0, request.priority) if request.tenant else request.priority
        return replace(
            request,
            priority=priority,
            expected_tokens=entry.expected.likely,
            served_as=served_as,
        )

    def requeue(self, request: Request, now: int) -> None:
        """One that was taken has lost its replica: with what there is of it by now it waits again,
        in its old place, beside the queue's bounds. Limits count it once, and nobody takes its
        place. `ValueError`: it does not run."""
        running = self._running.pop(request.request_id, None)
        if running is None:
            raise ValueError(f"request {request.request_id} does not run")
        self._places[running.rank] -= request.sampling.n
        self.service.ended(running, -running.charged, now)
        expected = self.lengths.estimate(running.request)
        entry = Entry(request, work_tokens(request), running.rank, expected)
        entry.again, entry.spent = True, running.tokens
        self._place(entry, now)
        self._lines.add(entry)
        self._speed.waits(now)
        self._left(request.tenant)

    def cancel(self, request_id: str, now: int) -> bool:
        """The client left. False if the request does not wait here (any more)."""
        entry = self._lines.get(request_id)
        if entry is None:
            return False
        self._drop(entry, now)
        return True

    def expire(self, now: int) -> list[Request]:
        """Take out all that waited longer than the TTL, or past their own deadline."""
        overdue = self._lines.overdue(now)
        for entry in overdue:
            self._drop(entry, now)
        return [entry.request for entry in overdue]

    def completed(self, request: Request, now: int, *, tokens: int, finished: bool) -> None:
        """A request that was taken is over, with so many output tokens of all choices. `finished`:
        it came to its end (else a client left, or a replica was lost)."""
        running = self._running.pop(request.request_id, None)
        if running is None:
            return
        actual = cost(work_tokens(request), tokens)
        self._places[running.rank] -= request.sampling.n
        self.service.ended(running, actual - running.charged, now)
        spent = work_tokens(request) + tokens
        self.service.meter(request.tenant, now).correct(spent - running.tokens, now)
        if finished:
            self.lengths.observe(request, tokens // request.sampling.n)
        if tokens:
            self._drain.add(work_tokens(request), now)
        self._left(request.tenant)

    def retry_after_s(self, now: int) -> float:
        """Seconds until what is queued now has drained, at least 1 and at most the TTL."""
        rate = self._drain.per_s(now)
        if rate is None:
            return min(RETRY_S_UNMEASURED, self.config.queue_ttl_s)
        drained_s = self._lines.tokens / max(rate, 1e-9)
        return min(max(drained_s, RETRY_S_MIN), self.config.queue_ttl_s)

    def renew(self, lease: Lease, now: int) -> None:
        """The control plane's word for the next second."""
        self.service.renew(lease, now)
        self._sync_all()

    def rank(self, request: Request) -> int:
        """Of its tier: 0 is the most important; an unknown tier counts as the least."""
        return self._ranks.get(request.tier, len(self._ranks) - 1)

    def queued_by_tier(self) -> tuple[int, ...]:
        """How many wait in each tier, the most important first."""
        return tuple(self._lines.requests_by_tier)

    def demand(self, dispatcher_id: str, now: int) -> Demand:
        """What the control plane splits leases by."""
        queued = [
            Flow(tier=self.config.tiers[rank].name, tenant=tenant, queued=line.tokens, served=0.0)
            for rank, tenant, line in self._lines.flows()
            if self.service.has_place(tenant)
        ]
        return self.service.demand(dispatcher_id, queued, now)

    def check(self) -> None:
        """Bounds hold, sums are exact, the order is right."""
        self._lines.check()
        self.lengths.check()
        self.service.check()
        bound = [one for _, _, line in self._lines.flows() for one in line.entries if not one.again]
        tokens = sum(one.tokens for one in bound)
        assert len(bound) <= self.config.max_queued_requests, "too many"
        assert len(bound) <= 1 or tokens <= self.config.max_queued_tokens, "too long"
        assert not any(one in self._lines for one in self._running), "queued, and runs"
        for rank in range(len(self._places)):
            mine = [one for one in self._running.values() if one.rank == rank]
            assert self._places[rank] == sum(one.request.sampling.n for one in mine), "places"
        for rank, tenant, _ in self._lines.flows():
            eligible = self.service.is_active(rank, tenant)
            assert eligible == self.service.has_place(tenant), "active, or not, by mistake"

    # -- the ways in and out ---------------------------------------------------------------------

    def _place(self, entry: Entry, now: int) -> None:
        request, tier = entry.request, self.config.tiers[entry.rank]
        prefill = self.capacity.step_ns + entry.tokens * self.capacity.token_ns
        service = prefill + self._generation_ns(entry)
        entry.key = self._lines.next_key(starts_by(request, tier, prefill, service))
        entry.offered = now
        ttl = now + int(self.config.queue_ttl_s * NS_PER_S)
        late = None if entry.again else request.deadline
        entry.expires = ttl if late is None else min(ttl, late)

    def _generation_ns(self, entry: Entry) -> int:
        return int((entry.expected.likely - 1) * self.pace.seconds() * NS_PER_S)

    def _late_s(self, entry: Entry, now: int) -> float:
        """By how many seconds it is predicted to miss its deadline; 0 or less: it won't."""
        if entry.request.deadline is None:
            return 0.0
        own = self.capacity.step_ns + entry.tokens * self.capacity.token_ns
        ends = now + self.predicted_wait_ns(entry, now) + own + self._generation_ns(entry)
        return (ends - entry.request.deadline) / NS_PER_S

    def predicted_wait_ns(self, entry: Entry, now: int) -> int:
        """In the queue: what is ahead in its line goes at the line's fair share of the measured
        speed; at worst all that is queued goes first, at full speed."""
        line = self._lines.line(entry.rank, entry.request.tenant)
        ahead = 0 if line is None else line.ahead_of(entry.key)
        per_s = self._speed.per_s(now)
        if per_s is None:
            says = self.capacity
            per_s = says.replicas * NS_PER_S / says.token_ns if says.token_ns else None
        if per_s is None:
            return 0  # nothing is known: nobody is refused for it
        share = self.service.share(entry.rank, entry.request.tenant)
        seconds = min(ahead / share, self._lines.tokens) / max(per_s, 1e-9)
        return int(min(seconds, self.config.queue_ttl_s) * NS_PER_S)

    def _has_place(self, rank: int) -> bool:
        places = self.capacity.places * self.service.lease_share
        return self._room.has_place(rank, self._places, places)

    def _drop(self, entry: Entry, now: int) -> None:
        """It leaves the queue without having run."""
        self._lines.remove(entry)
        tenant = entry.request.tenant
        self.service.meter(tenant, now).correct(-entry.spent, now)
        self._left(tenant)

    def _left(self, tenant: str) -> None:
        if not len(self._lines):
            self._speed.empty()
        for rank in range(len(self._places)):
            self._sync(rank, tenant)

    def _lapse(self, now: int) -> None:
        if self.service.lapse(now):
            self._sync_all()

    def _sync_all(self) -> None:
        for rank, tenant, _ in list(self._lines.flows()):
            self._sync(rank, tenant)

    def _sync(self, rank: int, tenant: str) -> None:
        waits = self._lines.line(rank, tenant) is not None
        self.service.note(rank, tenant, waits)

    def _spent(self, entry: Entry) -> int:
        """Tokens of a tenant's rate: prompt, and what will probably be answered."""
        return entry.tokens + entry.expected.likely * entry.request.sampling.n

    def _shed(self, reason: str, now: int) -> Shed:
        return Shed(retry_after_s=self.retry_after_s(now), reason=reason)


def work_tokens(request: Request) -> int:
    """What a request weighs here: the tokens to compute before its first new one."""
    return len(request.prompt) + sum(map(len, request.generated))


def cost(work: int, output: int) -> int:
    """Service: an output token counts twice (Sheng et al. 2024, section 4.1: as prices do)."""
    return work + 2 * output
