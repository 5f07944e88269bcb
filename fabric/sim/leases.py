"""The real `LeaseSplit`, once a second: several dispatchers share tenants' limits and turns."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.core.configs import AdmissionConfig
from fabric.core.control.leases import LeaseSplit
from fabric.sim.dispatcher import Dispatcher


class Leases:
    """What `cluster.control` does in the dispatcher that comes first; all hear of it at once."""

    def __init__(self, config: AdmissionConfig, dispatchers: Sequence[Dispatcher]) -> None:
        self._split = LeaseSplit(config.tiers, config.tenants)
        self._dispatchers = {one.name: one for one in dispatchers}
        self.turn(0)

    def turn(self, now: int) -> None:
        """Everybody says what is wanted; everybody gets a lease."""
        demands = [one.admission.demand(one.name, now) for one in self._dispatchers.values()]
        for lease in self._split.split(demands, now):
            self._dispatchers[lease.dispatcher_id].admission.renew(lease, now)
