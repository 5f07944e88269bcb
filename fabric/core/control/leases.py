"""Several dispatchers, one limit: what each may do until the next word, split once a second.

    demand  ──>  LeaseSplit.split  ──>  lease        (each dispatcher's, expires after `TTL_NS`)

Limits. A dispatcher may still be living by any lease from the one that it last named on, and runs
what it runs: that is what it may hold. It gets more only out of what nobody may hold, so the sum
over dispatchers never exceeds the limit: not while leases travel, not when one is lost, not when a
dispatcher dies (what it may hold comes back when its last lease has run out).

Fair shares. Counters (`core.fair`) are kept here, over all dispatchers; each goes on from them by
what it charges itself. Where several tenants of a tier are backlogged, nobody is served beyond a
ceiling: the lowest counter plus an allowance A. So a tenant's lead grows by at most A/w at each of
D dispatchers until the next lease, and no backlogged tenant is further behind than

    U/w(f) + U/w(g)  +  D * (A + U) / w(f)

A is what all dispatchers charged in the last interval, doubled, so that a fleet that gets faster is
not held up; at least `ALLOWANCE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fabric.core.fair import FairShare
from fabric.core.lease import Demand, FlowShare, Lease, TenantShare
from fabric.core.tenants import Tenant
from fabric.core.tiers import Tier

TTL_NS = 5_000_000_000
ALLOWANCE = 4_096.0

Holding = tuple[float, float, int]  # requests a minute, tokens a minute, at once


@dataclass(slots=True)
class _Known:
    """One dispatcher. `grants`: leases it may be living by, oldest first: granted, expires, shares.
    `served`: its charges by (tier, tenant); `waiting`: which of them are backlogged. All as of its
    last demand."""

    grants: list[tuple[int, int, dict[str, Holding]]]
    running: dict[str, int]
    offered: dict[str, int]
    wants: dict[str, int]
    served: dict[tuple[str, str], float]
    waiting: list[tuple[str, str]]


class LeaseSplit:
    """The control plane's books on dispatchers. One at a time: see `cluster.control`."""

    def __init__(self, tiers: Sequence[Tier], tenants: Sequence[Tenant]) -> None:
        weights = {tenant.name: tenant.weight for tenant in tenants}
        self._limited = [tenant for tenant in tenants if _is_limited(tenant)]
        self._fair = {tier.name: FairShare(weights) for tier in tiers}
        self._known: dict[str, _Known] = {}
        self._allowance = ALLOWANCE

    def split(self, demands: Sequence[Demand], now: int) -> list[Lease]:
        """A lease for each dispatcher that is heard of, in the order of their names."""
        demands = sorted(demands, key=lambda one: one.dispatcher_id)
        self._hear(demands, now)
        shares = self._shares([one.dispatcher_id for one in demands])
        leases = []
        for demand in demands:
            name = demand.dispatcher_id
            mine = {tenant: held[name] for tenant, held in shares.items()}
            known = self._known[name]
            known.grants.append((now, now + TTL_NS, mine))
            leases.append(
                Lease(
                    dispatcher_id=name,
                    granted=now,
                    expires=now + TTL_NS,
                    share=1.0 / len(demands),
                    tenants=tuple(_share(tenant, mine[tenant.name]) for tenant in self._limited),
                    flows=tuple(self._flow_shares(demand)),
                )
            )
        return leases

    def check(self) -> None:
        """Nobody's limit is given out twice."""
        for tenant in self._limited:
            given = _sum([_given(known, tenant.name) for known in self._known.values()])
            for what, limit in zip(given, _limits(tenant), strict=True):
                assert what <= limit + 1e-6, f"more than the limit of {tenant.name!r}"
        for fair in self._fair.values():
            fair.check()

    def _hear(self, demands: Sequence[Demand], now: int) -> None:
        for name in list(self._known):
            known = self._known[name]
            known.grants = [grant for grant in known.grants if grant[1] > now]
            if not known.grants and all(one.dispatcher_id != name for one in demands):
                del self._known[name]
        charged = 0.0
        for demand in demands:
            known = self._known.setdefault(
                demand.dispatcher_id,
                _Known(grants=[], running={}, offered={}, wants={}, served={}, waiting=[]),
            )
            if demand.lease is not None:  # what it held before this one is over
                known.grants = [grant for grant in known.grants if grant[0] >= demand.lease]
            known.running = dict(demand.running)
            offered = dict(demand.offered)
            known.wants = {
                name: known.running.get(name, 0) + _new(count, known.offered.get(name, count))
                for name, count in offered.items()
            }
            known.offered = offered
            charged += self._charge(demand, known)
            known.waiting = [(flow.tier, flow.tenant) for flow in demand.flows if flow.queued]
        self._allowance = max(ALLOWANCE, 2 * charged)
        self._note_backlogs()

    def _charge(self, demand: Demand, known: _Known) -> float:
        """Count what it served since its last demand; the first one only sets the mark."""
        total = 0.0
        for flow in demand.flows:
            key = (flow.tier, flow.tenant)
            since = flow.served - known.served.get(key, 0.0 if known.served else flow.served)
            known.served[key] = flow.served
            self._fair[flow.tier].charge(flow.tenant, since)
            total += max(0.0, since)
        return total

    def _note_backlogs(self) -> None:
        """One that was not heard of this time is as it was."""
        waiting = {flow for known in self._known.values() for flow in known.waiting}
        for tier, fair in self._fair.items():
            for name in fair.order():
                if (tier, name) not in waiting:
                    fair.leave(name)
            for name in sorted(tenant for of, tenant in waiting if of == tier):
                fair.enter(name)

    def _flow_shares(self, demand: Demand) -> list[FlowShare]:
        found = []
        for flow in demand.flows:
            fair = self._fair[flow.tier]
            order = fair.order()
            if len(order) > 1 and flow.queued:
                lowest = fair.counter(order[0])
                found.append(
                    FlowShare(
                        tier=flow.tier,
                        tenant=flow.tenant,
                        served=flow.served,
                        counter=fair.counter(flow.tenant),
                        ceiling=lowest + self._allowance / fair.weight(flow.tenant),
                    )
                )
        return found

    def _shares(self, names: Sequence[str]) -> dict[str, dict[str, Holding]]:
        """By tenant and dispatcher: shares by what is wanted, out of what nobody may hold."""
        return {tenant.name: self._shares_of(tenant, names) for tenant in self._limited}

    def _shares_of(self, tenant: Tenant, names: Sequence[str]) -> dict[str, Holding]:
        limits = _limits(tenant)
        holds = {name: _holding(known, tenant.name) for name, known in self._known.items()}
        wants = {name: 1 + self._known[name].wants.get(tenant.name, 0) for name in names}
        whole = sum(wants.values())
        free = [
            max(0.0, limit - held)
            for limit, held in zip(limits, _sum(list(holds.values())), strict=True)
        ]
        places = _whole_parts(limits[2], [wants[name] for name in names])
        found: dict[str, Holding] = {}
        for name, most in zip(names, places, strict=True):
            part = wants[name] / whole
            ideal = (limits[0] * part, limits[1] * part, float(most))
            given = []
            for i, want in enumerate(ideal):
                more = min(free[i], max(0.0, want - holds[name][i]))
                free[i] -= more
                given.append(min(want, holds[name][i] + more))
            found[name] = (given[0], given[1], int(given[2]))
        return found


def _new(count: int, before: int) -> int:
    """A count that fell began anew: the tenant had been away, or the dispatcher was made again."""
    return count - before if count >= before else count


def _given(known: _Known, tenant: str) -> Holding:
    """The most of any lease that a dispatcher may be living by."""
    shares = [grant[2][tenant] for grant in known.grants if tenant in grant[2]]
    return (
        max((share[0] for share in shares), default=0.0),
        max((share[1] for share in shares), default=0.0),
        max((share[2] for share in shares), default=0),
    )


def _holding(known: _Known, tenant: str) -> Holding:
    """That, and what it runs."""
    requests, tokens, at_once = _given(known, tenant)
    return requests, tokens, max(at_once, known.running.get(tenant, 0))


def _sum(holdings: Sequence[Holding]) -> Holding:
    return (
        sum(held[0] for held in holdings),
        sum(held[1] for held in holdings),
        sum(held[2] for held in holdings),
    )


def _whole_parts(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total`, as near to proportion as they can be."""
    parts, given, seen = [], 0, 0
    whole = sum(weights)
    for weight in weights:
        seen += weight
        upto = total * seen // whole
        parts.append(upto - given)
        given = upto
    return parts


def _limits(tenant: Tenant) -> Holding:
    """0 stands for no limit: nothing has to be given out."""
    return (
        float(tenant.requests_per_minute or 0),
        float(tenant.tokens_per_minute or 0),
        tenant.max_concurrent or 0,
    )


def _is_limited(tenant: Tenant) -> bool:
    return any(_limits(tenant))


def _share(tenant: Tenant, mine: Holding) -> TenantShare:
    return TenantShare(
        tenant=tenant.name,
        requests_per_minute=mine[0] if tenant.requests_per_minute else None,
        tokens_per_minute=mine[1] if tenant.tokens_per_minute else None,
        max_concurrent=mine[2] if tenant.max_concurrent else None,
    )
