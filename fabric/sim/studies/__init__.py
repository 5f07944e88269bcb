"""Studies: questions about a design, asked of the simulator. `fabric simulate study NAME`.

Their results stand in docs/studies.md. A new one: a function `(seed, trace) -> Result` in a file of
this folder, and a line in `STUDIES`.
"""

from __future__ import annotations

from fabric.sim.studies import autoscaling, disaggregation, fairness, lengths, overload, routing
from fabric.sim.studies.study import Study

__all__ = ["STUDIES", "Study", "study"]

STUDIES: tuple[Study, ...] = (
    Study(
        name="disaggregation",
        text="pools of their own for prompts and outputs against chunks (15 minutes)",
        run=disaggregation.run,
    ),
    Study(name="routing", text="routing policies, over three loads", run=routing.run),
    Study(
        name="autoscaling",
        text="against the static peak and one that knows the trace (--trace FILE)",
        run=autoscaling.run,
    ),
    Study(name="overload", text="tiers and preemption at 1 to 5 times capacity", run=overload.run),
    Study(name="fairness", text="one tenant floods, others don't", run=fairness.run),
    Study(
        name="lengths",
        text="is the estimate of output lengths calibrated? (--trace: a recorded one)",
        run=lengths.run,
    ),
)


def study(name: str) -> Study:
    """A study by name. Raises `ValueError` that lists the names there are."""
    for one in STUDIES:
        if one.name == name:
            return one
    raise ValueError(f"no study {name!r}; there are {', '.join(one.name for one in STUDIES)}")
