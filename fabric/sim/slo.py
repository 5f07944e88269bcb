"""The real ledger and the real degrade ladder, fed by what happens and obeyed by dispatchers."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.core.attainment import Outcome as Over
from fabric.core.attainment import SloSnapshot, worst_burn
from fabric.core.configs import DegradeConfig
from fabric.core.control.degrade import Ladder
from fabric.core.control.slo import Ledger
from fabric.core.journal import Recorder
from fabric.core.request import Finish
from fabric.core.tiers import Tier
from fabric.sim.clock import NS_PER_S
from fabric.sim.records import Decision, Outcome, Timeline
from fabric.sim.simulation import Simulation

OBJECTIVE = 0.99


class SloControl:
    """Added to a simulation before it runs. `degrade` None: it only counts. The autoscaler, where
    there is one, hears how fast the error budget burns."""

    def __init__(
        self,
        simulation: Simulation,
        tiers: Sequence[Tier],
        degrade: DegradeConfig | None,
        objective: float = OBJECTIVE,
    ) -> None:
        self.ledger = Ledger(tiers, objective=objective)
        self.ladder = None if degrade is None else Ladder(degrade, tiers)
        self.snapshot = SloSnapshot(taken=0)
        self._dispatchers = simulation.dispatchers
        self._outcome: Outcome = simulation.outcome
        for dispatcher in self._dispatchers:
            dispatcher.on_ended.append(self._over)
        simulation.every(NS_PER_S, self._turn)
        if simulation.scaling is not None:
            simulation.scaling.burn = self._burn

    def _burn(self, _: int) -> tuple[float, float]:
        return worst_burn(self.snapshot)

    def watch(self, journal: Recorder) -> None:
        """What is decided here is written down from now on."""
        self.ledger = journal.watch("ledger", self.ledger)
        if self.ladder is not None:
            self.ladder = journal.watch("ladder", self.ladder)

    def _over(self, timeline: Timeline, now: int) -> None:
        finished = timeline.finish in (Finish.STOP, Finish.LENGTH)
        if timeline.finish is None and timeline.refusal == "the client left":
            return
        request, e2e, waited = timeline.request, timeline.e2e_ns, timeline.waited_ns
        deadline = request.deadline
        self.ledger.observe(
            Over(
                tier=request.tier,
                tenant=request.tenant,
                version=request.model_version,
                adapter=request.adapter,
                queue_wait_s=_seconds(timeline.queued_ns if waited is None else waited),
                ttft_s=_seconds(timeline.ttft_ns),
                tpot_s=_seconds(timeline.tpot_ns),
                e2e_s=_seconds(e2e) if finished else None,
                tokens=timeline.tokens,
                deadline_kept=deadline is None
                or (timeline.last is not None and timeline.last <= deadline),
                refused=timeline.refusal is not None,
            ),
            now,
        )

    def _turn(self, now: int) -> None:
        self.snapshot = self.ledger.snapshot([self.ledger.page(now)], now)
        if self.ladder is None:
            return
        before = self.ladder.level
        degradation = self.ladder.decide(self.snapshot, now)
        self.ladder.check()
        if self.ladder.level != before:
            self._outcome.decisions.append(
                Decision(at=now, subject="degrade", value=self.ladder.level, why=self.ladder.why)
            )
        for dispatcher in self._dispatchers:
            dispatcher.admission.degradation = degradation


def _seconds(ns: float | None) -> float | None:
    return None if ns is None else ns / NS_PER_S
