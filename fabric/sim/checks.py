"""Checkers from outside: they keep their own books and trust no machine's.

After a storm comes a calm, and then every request that came must have been answered to its end or
refused with a reason; its client must have got every token once, in order, and the right one; and
every block of every replica must be free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fabric.core.request import Finish, Request, TokenChunk
from fabric.sim.clock import NS_PER_S
from fabric.sim.faults import Fault, Weather
from fabric.sim.records import Outcome, Timeline
from fabric.sim.replica import Stage
from fabric.sim.simulation import Arrival, Plan, Simulation
from fabric.sim.worker import token_at

CALM_NS = 600 * NS_PER_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something is wrong. `subject`: a request, a replica or a dispatcher."""

    subject: str
    what: str


class Witness:
    """Sits where the clients sit and writes down what they get."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._got: dict[str, dict[int, list[int]]] = {}
        self._late: list[Finding] = []
        self._ended: dict[str, int] = {}  # choices that ended, by request
        for dispatcher in simulation.dispatchers:
            dispatcher.on_chunks.append(self._note)

    def findings(self) -> list[Finding]:
        """What is wrong now, where all should be over."""
        found = list(self._late)
        for timeline in self._simulation.outcome.timelines:
            found += self._of_request(timeline)
        for dispatcher in self._simulation.dispatchers:
            queued, opened = dispatcher.admission.queued_requests, dispatcher.open_requests
            if queued or opened:
                what = f"{queued} requests wait and {opened} are open after the calm"
                found.append(Finding(subject=dispatcher.name, what=what))
        for replica in self._simulation.fleet.replicas.values():
            if not replica.crashed:
                found += self._of_replica(replica.name)
        return found

    def _note(self, timeline: Timeline, chunks: tuple[TokenChunk, ...]) -> None:
        name = timeline.request.request_id
        for chunk in chunks:
            tokens = self._got.setdefault(name, {}).setdefault(chunk.choice, [])
            if chunk.request_id != name or chunk.position != len(tokens):
                what = f"token {chunk.position} of {chunk.request_id} after {len(tokens)} tokens"
                self._late.append(Finding(subject=name, what=what))
            tokens.extend(chunk.tokens)
            self._ended[name] = self._ended.get(name, 0) + (chunk.finish is not None)

    def _of_request(self, timeline: Timeline) -> list[Finding]:
        request = timeline.request
        name = request.request_id
        if timeline.refusal is not None:
            if timeline.finish is not None:
                return [Finding(subject=name, what="refused and answered")]
            return [] if timeline.refusal else [Finding(subject=name, what="no reason given")]
        if timeline.finish not in (Finish.STOP, Finish.LENGTH):
            return [
                Finding(subject=name, what=f"it came, and was never answered: {timeline.finish}")
            ]
        if self._ended.get(name, 0) != request.sampling.n:
            return [Finding(subject=name, what="not every choice ended once")]
        found = []
        for choice in range(request.sampling.n):
            if self._got[name][choice] != self._expected(request, choice):
                found.append(Finding(subject=name, what=f"wrong tokens in choice {choice}"))
        return found

    def _expected(self, request: Request, choice: int) -> list[int]:
        seed, prompt = request.sampling.seed, len(request.prompt)
        length = request.sampling.max_tokens
        return [token_at(seed, choice, prompt + index) for index in range(length)]

    def _of_replica(self, name: str) -> list[Finding]:
        replica = self._simulation.fleet.replicas[name]
        state = replica.engine.snapshot(name, self._simulation.clock.now)
        found = []
        if state.blocks_free != state.blocks_total:
            what = f"{state.blocks_total - state.blocks_free} blocks are not free"
            found.append(Finding(subject=name, what=what))
        if state.host_blocks_free != state.host_blocks_total:
            found.append(Finding(subject=name, what="host blocks are not free"))
        if replica.stage is not Stage.GONE and not replica.idle:
            found.append(Finding(subject=name, what="it still has work"))
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A storm that is over: what happened, and what the checkers say."""

    outcome: Outcome
    findings: tuple[Finding, ...]
    ended: bool

    @property
    def resumed(self) -> int:
        """Requests that lost a replica and were answered all the same."""
        return sum(one.losses > 0 and one.finish is not None for one in self.outcome.timelines)


def trial(plan: Plan, arrivals: Iterable[Request | Arrival], faults: Iterable[Fault]) -> Trial:
    """Storm, then calm: until all is over, at most `CALM_NS` after the last fault."""
    simulation = Simulation(plan, arrivals)
    known = tuple(faults)
    Weather(simulation, known)
    witness = Witness(simulation)
    limit = max((one.at + one.lasts_ns for one in known), default=0) + CALM_NS

    def enough() -> bool:
        return simulation.over or simulation.clock.now > limit

    outcome = simulation.run(enough=enough)
    over = simulation.over
    if over:  # what an abort still has on its way
        simulation.settle(NS_PER_S)
    return Trial(outcome=outcome, findings=tuple(witness.findings()), ended=over)
