"""The engine's loop, in a thread of its own: arrivals, aborts, schedule, execute, commit, send.

    asyncio thread                            engine thread
    submit ──> inbox (a locked list) ──────>  engine.add / engine.abort
                                              plan = engine.schedule(now)
    one callback a step <── deliver ────────  the last step's tokens and a snapshot
    (C++ runs without the GIL: this           workers.submit(plan)
     thread serves its calls meanwhile)       result = workers.receive()
                                              tokens = engine.commit(plan, result, now)

With a pipeline of workers `plans_max` plans are under way before the first result is waited for.
Only the engine thread touches the engine and the workers. Others see the last `snapshot`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fabric.cluster.workers import Executes, StepOverdue
from fabric.core.engine.engine import Engine, Refused
from fabric.core.engine.plan import KvExport, StepPlan
from fabric.core.request import Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

FRUITLESS_WAIT_S = 0.01
# So many times what was foretold a step may take before a worker counts as hanging.
OVERDUE_TIMES = 20
NS_PER_S = 1_000_000_000

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one turn of the loop brought: tokens, and the state after it.

    `refused`: (request, reason) of arrivals that can never run here. `error`: the loop has ended,
    in a step of the requests `at_work` (None: between steps).
    """

    snapshot: ReplicaSnapshot
    chunks: list[TokenChunk]
    ended: int  # ns
    refused: tuple[tuple[str, str], ...] = ()
    error: str | None = None
    at_work: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """One thing to do before the next step: add `request`, or abort (`choice` None: all of it).

    `ask`: a verb of the engine, called after the request (if there is one) was taken in; `answer`
    gets its outcome, on the engine thread, or the exception that it raised."""

    request: Request | None = None
    abort: str = ""
    choice: int | None = None
    ask: Callable[[Engine], Any] | None = None
    answer: Callable[[Any], None] | None = None


class EngineLoop:
    """Turns the crank. `deliver` is called from the engine thread after every turn, `depart` when
    KV lies ready to be handed over."""

    def __init__(
        self,
        replica_id: str,
        engine: Engine,
        workers: Executes,
        deliver: Callable[[Step], None],
        *,
        step_deadline_s: float = 30.0,
        depart: Callable[[tuple[KvExport, ...]], None] | None = None,
    ) -> None:
        self.engine = engine
        self.workers = workers
        self.deliver = deliver
        self.depart = depart
        self.replica_id = replica_id
        self.snapshot = engine.snapshot(replica_id, time.time_ns())
        self.error: str | None = None
        self.hung = False  # it ended because a step was overdue
        self._deadline_s = self._least_deadline_s = step_deadline_s
        self._inbox: list[Command] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._fruitless = False
        self._flights: deque[StepPlan] = deque()  # submitted, their results not received
        self._held: list[TokenChunk] = []  # tokens of the last step, not delivered yet
        self._ended = time.time_ns()  # when that step ended
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Hand the engine thread something to do. Any thread."""
        with self._wake:
            self._inbox.append(command)
            self._wake.notify()

    def stuck_s(self) -> float:
        """For how long the step in hand has been running; 0 between steps, infinite once failed."""
        began = self._step_began
        if self.error is not None:
            return float("inf")
        return 0.0 if began is None else time.monotonic() - began

    def overdue(self) -> bool:
        """The step in hand takes longer than any should."""
        return self.error is None and self.stuck_s() > self._deadline_s

    def latest(self) -> ReplicaSnapshot:
        """The last snapshot; while nothing is to be done it is as of now. Any thread.

        Without this a request that came and went faster than news of it are believed would count as
        on its way here until the next one comes."""
        with self._wake:
            idle = not self._inbox and self._step_began is None and not self._is_busy()
            return replace(self.snapshot, taken=time.time_ns()) if idle else self.snapshot

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the loop after the step in hand."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while (commands := self._take_commands()) is not None:
                self._turn(commands)
        except Exception as error:
            log.exception("the engine loop failed")
            self.hung = isinstance(error, StepOverdue)
            self.error = f"{type(error).__name__}: {error}"
            self._send(self._held, (), error=self.error)

    def _take_commands(self) -> list[Command] | None:
        """All that has arrived; waits while there is nothing to do. None: stop."""
        with self._wake:
            while not (self._inbox or self._stopping or self._is_busy()):
                self._wake.wait()
            if self._fruitless and not (self._inbox or self._stopping or self._held):
                self._wake.wait(FRUITLESS_WAIT_S)  # work, but nothing could be planned: don't spin
            if self._stopping:
                return None
            commands, self._inbox = self._inbox, []
            return commands

    def _is_busy(self) -> bool:
        """Also when the last sequence was aborted while a plan names it, or its end is untold."""
        return bool(self._held or self._flights or self.engine.has_work)

    def _turn(self, commands: list[Command]) -> None:
        """Plan the next step, hand out the tokens of the last one, execute. A plan's result is
        waited for when as many are under way as can be, or nothing more can be planned.

        In this order the asyncio thread is at work on the tokens while this one is in C++ and does
        not need the interpreter; the other way round the next step would wait for it.
        """
        self._step_began = time.monotonic()
        refused = self._obey(commands)
        plan = self.engine.schedule(time.time_ns())
        self._fruitless = plan is None and not self._flights
        if self._held or commands:
            self._send(self._held, refused)
        self._held = []
        if plan is not None:
            self._flights.append(plan)
            self.workers.submit(plan)
            if plan.exports and self.depart is not None:
                self.depart(plan.exports)  # its copies come first: they need not wait for its step
        if self._flights and (plan is None or len(self._flights) == self.workers.plans_max):
            self._finish(self._flights.popleft())
        self._step_began = None

    def _finish(self, plan: StepPlan) -> None:
        """Wait for the oldest plan under way and take in what it brought."""
        foretold_s = self.engine.foretell_ns(plan) / NS_PER_S
        self._deadline_s = max(self._least_deadline_s, OVERDUE_TIMES * foretold_s)
        result = self.workers.receive(self._deadline_s)
        self._ended = time.time_ns()
        self._held = self.engine.commit(plan, result, self._ended)
        if not self._held:
            self._send([], ())  # prompt tokens only; but now there may be head-room

    def _obey(self, commands: list[Command]) -> tuple[tuple[str, str], ...]:
        """Take arrivals in, end what was aborted; who was refused, and why."""
        now = time.time_ns()
        refused = []
        for command in commands:
            if command.request is not None:
                outcome = self.engine.add(command.request, now)
                if isinstance(outcome, Refused):
                    refused.append((command.request.request_id, outcome.reason))
                    continue
            elif command.ask is None:
                self._held += self.engine.abort(command.abort, command.choice)
            if command.ask is not None:
                self._answer(command.ask, command.answer)
        return tuple(refused)

    def _answer(self, ask: Callable[[Engine], Any], answer: Callable[[Any], None] | None) -> None:
        """Misuse is who asked's affair; anything else has left the engine's books in doubt."""
        outcome: Any
        try:
            outcome = ask(self.engine)
        except ValueError as error:
            if answer is None:
                log.exception("the engine was misused")
            outcome = error
        except Exception as error:
            if answer is not None:
                answer(error)
            raise
        if answer is not None:
            answer(outcome)

    def _send(
        self,
        chunks: list[TokenChunk],
        refused: tuple[tuple[str, str], ...],
        error: str | None = None,
    ) -> None:
        if error is None:
            self.snapshot = self.engine.snapshot(self.replica_id, time.time_ns())
        self.deliver(
            Step(
                snapshot=self.snapshot,
                chunks=chunks,
                ended=self._ended,
                refused=refused,
                error=error,
                at_work=(self.engine.at_work() or None) if error is not None else None,
            )
        )
