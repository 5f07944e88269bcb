"""The real `Autoscaler`, asked once a second as Serve asks it, and obeyed by the fleet."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fabric.core.configs import AutoscalerConfig
from fabric.core.control.autoscaler import Autoscaler, Target
from fabric.core.snapshot import PoolSnapshot
from fabric.sim.dispatcher import Dispatcher
from fabric.sim.fleet import Fleet
from fabric.sim.records import Decision, Outcome

POOL = "mixed"
# Error-budget burn over one and ten minutes.
Burn = Callable[[int], tuple[float, float]]


class Scaling:
    """Puts together what the autoscaler may know, and does what it says. `burn` None: no ledger."""

    def __init__(
        self, config: AutoscalerConfig, fleet: Fleet, outcome: Outcome, burn: Burn | None = None
    ) -> None:
        self.autoscaler = Autoscaler(config)
        self.wanted = 0
        self.target: Target | None = None
        self.burn = burn
        self._fleet = fleet
        self._outcome = outcome

    def decide(self, dispatchers: Sequence[Dispatcher], now: int) -> None:
        """One turn."""
        target = self.autoscaler.decide(self._pool(dispatchers, now), now)
        if target.replicas != self.wanted:
            self._outcome.decisions.append(
                Decision(at=now, subject=POOL, value=target.replicas, why=target.why)
            )
            self._fleet.scale_to(target.replicas)
        self.wanted, self.target = target.replicas, target

    def _pool(self, dispatchers: Sequence[Dispatcher], now: int) -> PoolSnapshot:
        minute, ten_minutes = self.burn(now) if self.burn else (0.0, 0.0)
        return PoolSnapshot(
            pool=POOL,
            taken=now,
            wanted=self.wanted,
            replicas=tuple(one.snapshot for one in self._fleet.ready()),
            queued_requests=sum(one.admission.queued_requests for one in dispatchers),
            queued_tokens=sum(one.admission.queued_tokens for one in dispatchers),
            arrived_requests_total=sum(one.arrived_requests for one in dispatchers),
            arrived_tokens_total=sum(one.arrived_tokens for one in dispatchers),
            burn_minute=minute,
            burn_ten_minutes=ten_minutes,
        )
