"""Who has had how much: fair shares of tiers and tenants, limits, and the lease on both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from fabric.core.configs import AdmissionConfig
from fabric.core.fair import FairShare
from fabric.core.lease import Demand, Flow, Lease
from fabric.core.request import Request
from fabric.core.tenants import Tenant
from fabric.core.traffic.limits import Meter

# So far ahead of the tenant furthest behind, in service over its weight, may one be that goes
# before it while its requests wait for replicas that hold their prefixes (`release`).
PASSED = 65_536.0
# So far behind another tier, in service over weight, a tier may be: then its requests are served as
# the first tier's. Little: what it gets that way is no more than its share.
TIER_PASSED = 1_024.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A request that was taken. `charged`: cost so far; `tokens`: spent of the tenant's rate."""

    request: Request
    rank: int
    charged: int
    tokens: int


class Service:
    """What one dispatcher has served, and may serve.

    One of several `dispatchers` gives nothing to limited tenants until its first lease comes.
    """

    def __init__(self, config: AdmissionConfig, dispatchers: int) -> None:
        self.lease_share = 1.0 / dispatchers
        self._names = [tier.name for tier in config.tiers]
        self._tenants = {tenant.name: tenant for tenant in config.tenants}
        weights = {tenant.name: tenant.weight for tenant in config.tenants}
        self._by_tier = FairShare({tier.name: tier.weight for tier in config.tiers})
        self._by_tenant = [FairShare(weights) for _ in config.tiers]
        self._meters: dict[str, Meter] = {}
        self._served: dict[tuple[int, str], float] = {}  # by rank and tenant
        self._ceilings: dict[tuple[int, str], float] = {}
        self._dispatchers = dispatchers
        self._lease: Lease | None = None

    def meter(self, tenant: str, now: int) -> Meter:
        """A tenant's limits here."""
        found = self._meters.get(tenant)
        if found is None:
            limits = self._tenants.get(tenant) or Tenant(name=tenant)
            found = self._meters[tenant] = Meter(limits, now)
            if self._dispatchers > 1:
                self._apply(found, tenant, now)
        return found

    def _apply(self, meter: Meter, tenant: str, now: int) -> None:
        """What the lease says; without one, whatever is limited is closed."""
        for share in self._lease.tenants if self._lease is not None else ():
            if share.tenant == tenant:
                meter.resize(share, now)
                return
        meter.close(now)

    def has_place(self, tenant: str) -> bool:
        """May one more of its requests run?"""
        found = self._meters.get(tenant)
        return found is None or found.has_place

    def note(self, rank: int, tenant: str, waits: bool) -> None:
        """Does anything of the tenant wait in the tier? Who may not run takes part in nothing."""
        fair = self._by_tenant[rank]
        if waits and self.has_place(tenant):
            fair.enter(tenant)
        else:
            fair.leave(tenant)
        name = self._names[rank]
        if fair.active:
            self._by_tier.enter(name)
        else:
            self._by_tier.leave(name)
        meter = self._meters.get(tenant)
        if meter is not None and not waits and meter.idle:
            del self._meters[tenant]

    def is_active(self, rank: int, tenant: str) -> bool:
        """Does it take part in the sharing?"""
        return tenant in self._by_tenant[rank].order()

    def tiers_in_order(self) -> list[int]:
        """Ranks of tiers with something to send, the one furthest behind its share first."""
        return [self._names.index(name) for name in self._by_tier.order()]

    def is_passed_over(self, rank: int) -> bool:
        """Another tier with something to send has had too much more than this one, over weights:
        better ones left no head-room for it. Served as the first tier, it finds some whenever
        anybody does, and its turn is before all others': so two backlogged tiers are never further
        apart than U/w + U/w' + `TIER_PASSED`, as far as places are not kept for better ones."""
        counter = self._by_tier.counter
        least = counter(self._names[rank]) + TIER_PASSED
        return any(counter(other) > least for other in self._by_tier.order())

    def tenants_in_order(self, rank: int) -> list[str]:
        """The same for the tenants of a tier; those too far ahead of others elsewhere wait."""
        fair = self._by_tenant[rank]
        return [
            tenant
            for tenant in fair.order()
            if fair.counter(tenant) <= self._ceilings.get((rank, tenant), inf)
        ]

    def tenants_beside(self, rank: int) -> list[str]:
        """Those of `tenants_in_order` that may be served although the first is not: so two that
        are backlogged, f and g, are never further apart than (`fair`, U the largest charge)

            U/w(f) + U/w(g) + PASSED
        """
        tenants, fair = self.tenants_in_order(rank), self._by_tenant[rank]
        if len(tenants) < 2:
            return tenants
        limit = fair.counter(tenants[0]) + PASSED
        return [tenant for tenant in tenants if fair.counter(tenant) <= limit]

    def share(self, rank: int, tenant: str) -> float:
        """The part of all service that a tenant's line in this tier can count on now."""
        tier = self._by_tier.share(self._names[rank])
        return tier * self._by_tenant[rank].share(tenant)

    def charge(self, rank: int, tenant: str, cost: float) -> None:
        """It gets service, or gets back what it was charged too much."""
        self._by_tier.charge(self._names[rank], cost)
        self._by_tenant[rank].charge(tenant, cost)
        if self._dispatchers > 1:
            key = (rank, tenant)
            self._served[key] = self._served.get(key, 0.0) + cost

    def ended(self, running: Running, charge: int, now: int) -> None:
        """It does not run any more; `charge`: what it cost beside what it was charged."""
        self.charge(running.rank, running.request.tenant, charge)
        self.meter(running.request.tenant, now).running -= 1

    def renew(self, lease: Lease, now: int) -> None:
        """Live by this lease from now on."""
        self.lease_share = lease.share
        self._lease = lease
        for tenant, meter in self._meters.items():
            self._apply(meter, tenant, now)
        self._ceilings = {}
        for flow in lease.flows:
            rank = self._names.index(flow.tier)
            fair = self._by_tenant[rank]
            since = self._served.get((rank, flow.tenant), 0.0) - flow.served
            fair.adopt(flow.tenant, max(0.0, flow.counter + since / fair.weight(flow.tenant)))
            self._ceilings[rank, flow.tenant] = flow.ceiling

    def lapse(self, now: int) -> bool:
        """The lease has run out: nobody knows what others were given meanwhile. True: just now."""
        if self._lease is None or now < self._lease.expires:
            return False
        self._lease = None
        self._ceilings = {}
        for meter in self._meters.values():
            meter.close(now)
        return True

    def demand(self, dispatcher_id: str, queued: list[Flow], now: int) -> Demand:
        """What the control plane is to know, `served` filled in."""
        known = {(flow.tier, flow.tenant): flow for flow in queued}
        for rank, tenant in self._served:
            name = self._names[rank]
            known.setdefault((name, tenant), Flow(tier=name, tenant=tenant, queued=0, served=0.0))
        flows = tuple(
            replace(flow, served=self._served.get((self._names.index(tier), tenant), 0.0))
            for (tier, tenant), flow in sorted(known.items())
        )
        limited = sorted(name for name, meter in self._meters.items() if name in self._tenants)
        return Demand(
            dispatcher_id=dispatcher_id,
            taken=now,
            lease=None if self._lease is None else self._lease.granted,
            flows=flows,
            running=tuple((name, self._meters[name].running) for name in limited),
            offered=tuple((name, self._meters[name].offered) for name in limited),
        )

    def check(self) -> None:
        """The counters' own, and nobody runs less than nothing."""
        self._by_tier.check()
        for rank, fair in enumerate(self._by_tenant):
            fair.check()
            tier = self._names[rank] in self._by_tier.order()
            assert fair.active == tier, "a tier takes part without its tenants, or the other way"
        assert all(meter.running >= 0 for meter in self._meters.values()), "running"
