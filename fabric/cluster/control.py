"""The control loop as dispatchers run it, once a second: ledgers merged, leases split, the ladder.

Every dispatcher's report reaches all others by way of the replicas. So there is no process for
this: each merges the pages of all (they see the same, but for a second), and the one whose name
comes first splits the leases. When it dies its report is gone as soon as the replicas give it up,
and the next one takes over once all leases have run out, with counters that begin anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fabric.cluster.letters import (
    demand_of_row,
    demand_row,
    lease_of_row,
    lease_row,
    page_of_row,
    page_row,
)
from fabric.cluster.reports import DispatcherReport
from fabric.core.attainment import Outcome, SloSnapshot, burn_by_part, worst_burn
from fabric.core.configs import AdmissionConfig, DegradeConfig
from fabric.core.control.degrade import Ladder
from fabric.core.control.leases import TTL_NS, LeaseSplit
from fabric.core.control.slo import Ledger
from fabric.core.journal import Recorder, watched
from fabric.core.traffic.admission import Admission

Row = tuple[Any, ...]


class Control:
    """One dispatcher's share of it. `objective`: of the requests that are to meet their targets."""

    def __init__(
        self,
        identity: str,
        admission: Admission,
        degrade: DegradeConfig,
        *,
        objective: float,
        dispatchers: int,
        journal: Recorder | None = None,
    ) -> None:
        config: AdmissionConfig = admission.config
        self.slo = SloSnapshot(taken=0)
        self.ladder = watched(journal, "ladder", Ladder(degrade, config.tiers))
        self._identity = identity
        self._admission = admission
        ledger = Ledger(config.tiers, objective=objective)
        self._ledger = watched(journal, "ledger", ledger)
        self._journal = journal
        self._several = dispatchers > 1
        self._config = config
        self._split: LeaseSplit | None = None  # only of the one that comes first
        self._leases: tuple[Row, ...] = ()
        self._obeyed = 0  # when the lease was granted that we live by
        self._page: Row = ()
        self._began: int | None = None

    def observe(self, outcome: Outcome, now: int) -> None:
        """A request is over. One of a tier that is not configured (any more) is not counted."""
        if outcome.tier in {tier.name for tier in self._config.tiers}:
            self._ledger.observe(outcome, now)

    def turn(self, reports: Sequence[DispatcherReport], now: int) -> None:
        """One second's work, with what is known of all dispatchers (this one too)."""
        self._page = page_row(self._ledger.page(now))
        pages = [page_of_row(one.page) for one in reports if one.dispatcher_id != self._identity]
        self.slo = self._ledger.snapshot([*pages, self._ledger.page(now)], now)
        self._admission.degradation = self.ladder.decide(self.slo, now)
        if self._several:
            self._share(reports, now)

    def fields(self, now: int) -> dict[str, Any]:
        """What this dispatcher's report says of it."""
        several = self._several
        minute, ten_minutes = worst_burn(self.slo)
        first, later = burn_by_part(self.slo, self._config.tiers)
        return {
            "burn_minute": minute,
            "burn_ten_minutes": ten_minutes,
            "first_burn_minute": first[0],
            "first_burn_ten_minutes": first[1],
            "later_burn_minute": later[0],
            "later_burn_ten_minutes": later[1],
            "page": self._page,
            "demand": demand_row(self._admission.demand(self._identity, now)) if several else (),
            "leases": self._leases,
            "degraded": self.ladder.level,
            "moves": tuple(
                (rung, way, times) for (rung, way), times in sorted(self.ladder.moves.items())
            ),
        }

    def _share(self, reports: Sequence[DispatcherReport], now: int) -> None:
        first = min([self._identity, *(one.dispatcher_id for one in reports)])
        if first == self._identity:
            self._leases = self._grant(reports, now)
        else:
            self._split, self._began, self._leases = None, None, ()
        rows = self._leases
        for one in reports:
            if one.dispatcher_id == first and first != self._identity:
                rows = one.leases
        for row in rows:
            lease = lease_of_row(row)
            if lease.dispatcher_id == self._identity and lease.granted > self._obeyed:
                self._obeyed = lease.granted
                if lease.expires > now:
                    self._admission.renew(lease, now)

    def _grant(self, reports: Sequence[DispatcherReport], now: int) -> tuple[Row, ...]:
        """A new one waits until all leases of the one before it have run out."""
        self._began = now if self._began is None else self._began
        if now - self._began < TTL_NS:
            return ()
        if self._split is None:
            split = LeaseSplit(self._config.tiers, self._config.tenants)
            self._split = watched(self._journal, "split", split)
        others = [
            demand_of_row(one.demand)
            for one in reports
            if one.dispatcher_id != self._identity and one.demand
        ]
        own = self._admission.demand(self._identity, now)
        fresh = [one for one in others if now - one.taken < TTL_NS]
        return tuple(lease_row(lease) for lease in self._split.split([own, *fresh], now))
