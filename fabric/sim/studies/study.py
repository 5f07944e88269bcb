"""What a study is, and what all of them need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fabric.core.configs import DegradeConfig
from fabric.core.request import Request
from fabric.sim.deployment import Deployment
from fabric.sim.records import Outcome
from fabric.sim.scenarios.result import Result
from fabric.sim.simulation import Plan
from fabric.sim.slo import OBJECTIVE
from fabric.sim.summary import Summary, summarize
from fabric.workload.replay import Replay, replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A trace, and how it is replayed."""

    path: Path
    how: Replay

    def requests(self) -> Iterable[Request]:
        """Anew with every call."""
        return replay(self.path, self.how)


class StudyRun(Protocol):
    """A study's function."""

    def __call__(self, seed: str, trace: Recorded | None) -> Result:
        """Its rows and targets."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """`run(seed, trace)`: a pure function of both; `trace` None: a made-up load."""

    name: str
    text: str
    run: StudyRun


def served(plan: Plan, arrivals: Iterable[Request]) -> tuple[Outcome, Summary]:
    """A run with its ledger, nothing degraded, and its figures."""
    deployment = Deployment(name="", plan=plan, objective=OBJECTIVE, degrade=DegradeConfig())
    outcome = deployment.run(arrivals)
    return outcome, summarize(outcome, plan.admission.tiers, plan.profile)
