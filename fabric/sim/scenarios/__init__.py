"""Named experiments: each runs the simulator once or more and says whether its targets are met.

A new one: a function `(seed) -> Result` in a file of this folder, and a line in `SCENARIOS`.
"""

from __future__ import annotations

from fabric.sim.scenarios import (
    autoscaling,
    baseline,
    chunking,
    degrading,
    preempting,
    routing,
    sharing,
    storms,
)
from fabric.sim.scenarios.result import Result, Scenario, Target

__all__ = ["SCENARIOS", "Result", "Scenario", "Target", "scenario"]

SCENARIOS: tuple[Scenario, ...] = (
    *baseline.SCENARIOS,
    *autoscaling.SCENARIOS,
    *chunking.SCENARIOS,
    *degrading.SCENARIOS,
    *preempting.SCENARIOS,
    *routing.SCENARIOS,
    *sharing.SCENARIOS,
    *storms.SCENARIOS,
)


def scenario(name: str) -> Scenario:
    """A scenario by name. Raises `ValueError` that lists the names there are."""
    for one in SCENARIOS:
        if one.name == name:
            return one
    raise ValueError(f"no scenario {name!r}; there are {', '.join(one.name for one in SCENARIOS)}")
