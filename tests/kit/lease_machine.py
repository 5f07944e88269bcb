"""`LeaseSplit` against a network that loses everything but the order of what it brings."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from fabric.core.control.leases import TTL_NS, LeaseSplit
from fabric.core.lease import Demand, Lease, TenantShare
from fabric.core.tenants import Tenant
from fabric.core.tiers import Tier

NS_PER_S = 1_000_000_000
TIERS = (Tier(name="standard", ttft_ms=1_000, tpot_ms=100),)
FEW, SLOW = 5, 120.0
TENANTS = (
    Tenant(name="few", max_concurrent=FEW),
    Tenant(name="slow", requests_per_minute=int(SLOW)),
)
NAMES = ("d0", "d1", "d2")


@dataclass(slots=True)
class Front:
    """A dispatcher as its clients see it. `coming`: leases on their way to it, oldest first;
    `heard`: when the control plane last heard of it."""

    lease: Lease | None = None
    coming: list[Lease] = field(default_factory=list)
    running: int = 0
    offered: int = 0
    heard: int = 0
    dead: bool = False

    def share(self, tenant: str, now: int) -> TenantShare | None:
        """What its lease allows, while it holds."""
        if self.lease is None or self.lease.expires <= now:
            return None
        return next(one for one in self.lease.tenants if one.tenant == tenant)


class LeaseMachine(RuleBasedStateMachine):
    """Nothing is given out twice whatever is lost; in a calm all of it is given out again."""

    @initialize()
    def build(self) -> None:
        self.split = LeaseSplit(TIERS, TENANTS)
        self.fronts = {name: Front() for name in NAMES}
        self.now = NS_PER_S

    @rule(name=st.sampled_from(NAMES), many=st.integers(1, 4))
    def start(self, name: str, many: int) -> None:
        """Requests of "few" come: as many run as may."""
        front = self.fronts[name]
        front.offered += many
        for _ in range(many):
            share = front.share("few", self.now)
            if share is not None and front.running < (share.max_concurrent or 0):
                front.running += 1

    @rule(name=st.sampled_from(NAMES), many=st.integers(1, 3))
    def end(self, name: str, many: int) -> None:
        front = self.fronts[name]
        front.running = max(0, front.running - many)

    @rule(tenths=st.sampled_from([3, 10, 10, 30, 51]))
    def wait(self, tenths: int) -> None:
        """What a silent dispatcher has running is given up by the replicas."""
        self.now += tenths * NS_PER_S // 10
        for front in self.fronts.values():
            if self.now - front.heard >= TTL_NS:
                front.running = 0

    @rule(heard=st.sets(st.sampled_from(NAMES), min_size=1))
    def sync(self, heard: set[str]) -> None:
        """These are heard of; their leases are on their way."""
        demands = [self._demand(name) for name in sorted(heard) if not self.fronts[name].dead]
        for lease in self.split.split(demands, self.now):
            front = self.fronts[lease.dispatcher_id]
            front.heard = self.now
            front.coming.append(lease)

    @rule(name=st.sampled_from(NAMES), lost=st.integers(0, 2))
    def deliver(self, name: str, lost: int) -> None:
        """Some are lost before one arrives."""
        front = self.fronts[name]
        arrived = front.coming[lost : lost + 1]
        front.coming = front.coming[lost + 1 :]
        if arrived and not front.dead:
            front.lease = arrived[0]

    @rule(name=st.sampled_from(NAMES))
    def die(self, name: str) -> None:
        """Or come back, empty; what its last life ran is given up when it is not heard of."""
        front = self.fronts[name]
        if not front.dead:
            front.dead = True
        elif not front.running:
            self.fronts[name] = Front(heard=front.heard)

    @rule(
        heard=st.sampled_from([{"d0"}, {"d1", "d2"}, set(NAMES), set(NAMES)]),
        deaf=st.sampled_from([None, None, "d0", "d1"]),
    )
    def second(self, heard: set[str], deaf: str | None) -> None:
        """An ordinary one: these are heard of, and all hear but perhaps one, which misses it."""
        self.wait(10)
        self.sync(heard)
        for name in NAMES:
            waiting = len(self.fronts[name].coming)
            self.deliver(name, waiting if name == deaf else max(0, waiting - 1))

    @rule()
    def calm(self) -> None:
        """For longer than a lease everybody who lives is heard of and hears: all is given out."""
        for _ in range(7):
            self.second(set(NAMES), None)
            self.limits_hold()
        alive = [front for front in self.fronts.values() if not front.dead]
        slow = [front.share("slow", self.now) for front in alive]
        few = [front.share("few", self.now) for front in alive]
        if alive:
            rates = [one.requests_per_minute or 0.0 for one in slow if one is not None]
            assert abs(sum(rates) - SLOW) < 1e-6, "a part of a limit is lost for good"
            places = [one.max_concurrent or 0 for one in few if one is not None]
            over = sum(front.running for front in alive)
            assert sum(places) + over >= FEW, "places are lost for good"

    @invariant()
    def limits_hold(self) -> None:
        """In sum, over those that live by a lease, and over all that runs."""
        if not hasattr(self, "fronts"):
            return
        self.split.check()
        running = sum(front.running for front in self.fronts.values())
        assert running <= FEW, f"{running} run at once, {FEW} may"
        shares = [front.share("slow", self.now) for front in self.fronts.values()]
        rates = [one.requests_per_minute or 0.0 for one in shares if one is not None]
        assert sum(rates) <= SLOW + 1e-6, "a limit is given out twice"

    def _demand(self, name: str) -> Demand:
        front = self.fronts[name]
        alive = front.share("few", self.now) is not None
        return Demand(
            dispatcher_id=name,
            taken=self.now,
            lease=front.lease.granted if alive and front.lease is not None else None,
            running=(("few", front.running),),
            offered=(("few", front.offered), ("slow", front.offered)),
        )
