"""What runs an engine's plans: the worker in this process, or a group of them in others."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from fabric.cluster.reports import ShardReport
from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.errors import Unavailable


class StepOverdue(Unavailable):
    """A step takes so much longer than was foretold that a worker must be hanging."""


class Executes(Protocol):
    """Plans in, results out, in order. `submit` and `receive` come from one thread."""

    @property
    def plans_max(self) -> int:
        """How many plans can be under way before the first result is asked for: the stages of
        a pipeline."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Begin with a plan. Raises what `receive` does."""
        ...

    def receive(self, deadline_s: float) -> StepResult:
        """The result of the oldest plan under way; waits for it. Raises `Unavailable` when a
        worker is lost, `StepOverdue` when one hangs, and what it raises; then nothing works any
        more. A worker in this process can't be left alone: there nobody counts the seconds."""
        ...

    def problem(self) -> str | None:
        """Why nothing works any more, as far as is known without asking it to."""
        ...

    def shards(self) -> tuple[ShardReport, ...]:
        """What each worker holds; nothing of one that is alone. Any thread."""
        ...

    def stop(self) -> None:
        """Let go of what was started for it."""
        ...


class InProcess:
    """A worker in this process: a plan is executed when its result is asked for."""

    plans_max = 1

    def __init__(self, execute: Callable[[StepPlan], StepResult | None]) -> None:
        self._execute = execute
        self._plans: deque[StepPlan] = deque()

    def submit(self, plan: StepPlan) -> None:
        """See `Executes`."""
        self._plans.append(plan)

    def receive(self, deadline_s: float) -> StepResult:
        """See `Executes`."""
        del deadline_s
        result = self._execute(self._plans.popleft())
        assert result is not None, "a worker that is alone draws the tokens"
        return result

    def problem(self) -> str | None:
        """See `Executes`: the engine loop is the first to know."""
        return None

    def shards(self) -> tuple[ShardReport, ...]:
        """See `Executes`."""
        return ()

    def stop(self) -> None:
        """See `Executes`. The worker's memory is free once nobody else holds it."""
        self._execute = _stopped


def _stopped(plan: StepPlan) -> StepResult | None:
    raise Unavailable(f"plan {plan.plan_id} came after the end")
