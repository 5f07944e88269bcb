"""A request in an engine, as the engine's journal tells it: when it ran, why not, what preempted
it."""

from __future__ import annotations

from typing import Any

from fabric.core.engine.aging import AGED
from fabric.core.engine.engine import Engine, Refused
from fabric.core.engine.plan import StepPlan
from fabric.core.engine.scheduler import Scheduler
from fabric.core.engine.sequence import Sequence
from fabric.core.replay import Played, Replay, Verb
from fabric.core.request import Request, TokenChunk
from fabric.journal.story import Story


class InEngine:
    """Looks on while an engine's journal is played. `engine`: its name there."""

    def __init__(self, replay: Replay, name: str, where: str, engine: str) -> None:
        self.story = Story(where=where)
        self._replay = replay
        self._engine = engine
        self._name = name
        self._ran: dict[int, tuple[bool, int]] = {}  # before: number -> (it ran, its blocks)
        self._current = name  # after a loss it goes on under another name, with a number
        self._mine: list[Sequence] = []
        self._tokens = 0
        self._prompt_steps = 0

    def after(self, played: Played) -> None:
        """A verb has been played."""
        engine: Engine = self._replay.machines[self._engine]
        if played.verb == "add":
            self._add(engine, played)
        elif played.verb == "schedule" and self._mine:
            self._schedule(engine, played.outcome, played.arguments[0])
        elif played.verb == "commit":
            self._chunks(played.outcome, played.arguments[2])
        elif played.verb == "abort" and played.arguments[0] == self._current:
            self.story.tell(self._last, "aborted: its client left, or has what it wanted")

    @property
    def _last(self) -> int:
        """An abort has no time of its own."""
        return self.story.lines[-1].until or self.story.lines[-1].at if self.story.lines else 0

    def _add(self, engine: Engine, played: Played) -> None:
        request, now = played.arguments
        if not isinstance(request, Request) or not self._is_it(request.request_id):
            return
        self._current = request.request_id
        if isinstance(played.outcome, Refused):
            self.story.tell(now, f"refused: {played.outcome.reason}")
            return
        scheduler = engine._scheduler
        resumed = sum(map(len, request.generated))
        waiting = [one.group.request.request_id for one in scheduler.waiting.items]
        self.story.tell(
            now,
            f"arrives: {len(scheduler.running)} run in {scheduler.places} places, "
            f"{sum(one != self._current for one in waiting)} wait, {scheduler.pool.free:,} of "
            f"{scheduler.pool.num_blocks:,} blocks are free"
            + (f"; it goes on after {resumed:,} tokens" if resumed else ""),
        )

    def _is_it(self, request_id: str) -> bool:
        name, _, losses = request_id.rpartition("+")
        return request_id == self._name or (name == self._name and losses.isdecimal())

    def before(self, machine: Any, verb: Verb, _: tuple[Any, ...]) -> None:
        """Who runs, before the step is planned."""
        if verb.verb != "schedule" or not isinstance(machine, Engine):
            return
        group = machine._groups.get(self._current)
        self._mine = [] if group is None else list(group.live.values())
        if self._mine:
            running = machine._scheduler.running.items
            self._ran = {one.number: (True, len(one.blocks)) for one in running}

    def _schedule(self, engine: Engine, plan: StepPlan | None, now: int) -> None:
        scheduler = engine._scheduler
        rows = {} if plan is None else {step.sequence: step for step in plan.steps}
        for one in self._mine:
            which = f"choice {one.choice}: " if one.group.request.sampling.n > 1 else ""
            ran = one.number in self._ran
            if one.of_class == AGED and one.stood_since is not None and not ran and one.running:
                which += "stood still for so long that it goes first; "
            if ran and not one.running:
                self.story.tell(now, which + self._preempted(scheduler, one))
            elif not ran and one.running:
                self.story.tell(now, which + _begins(one))
            elif not one.running:
                waits, why = _why_not(engine, one)
                self.story.lasts(now, waits, f"{which}waits: {why}")
            step = rows.get(one.number)
            if step is not None and one.running:
                self.story.end(now)
                if step.start < one.prompt_length:
                    self._prompt_steps += 1
            elif one.running and ran and not one.in_flight:
                self.story.lasts(
                    now, "standing still", f"{which}stands still: {_stands(scheduler, one)}"
                )

    def _preempted(self, scheduler: Scheduler, victim: Sequence) -> str:
        where = (
            f"its {len(victim.host_blocks)} blocks go to the host"
            if victim.host_blocks
            else "its blocks are given away, to be computed again"
        )
        better = [one for one in scheduler.running.items if one.key < victim.key]
        came = [one for one in better if one.number not in self._ran]
        grown = [
            one
            for one in better
            if one.number in self._ran and len(one.blocks) > self._ran[one.number][1]
        ]
        names = [
            f"{one.group.request.request_id} ({one.group.request.tier})" for one in came or grown
        ]
        reason = "which comes in" if came else "which needs another block"
        by = f"for {', '.join(names[:3])}, {reason}" if names else "for more important ones"
        return f"preempted {by}: {where}"

    def _chunks(self, chunks: Any, now: int) -> None:
        for chunk in chunks:
            if not isinstance(chunk, TokenChunk) or chunk.request_id != self._current:
                continue
            self._tokens += len(chunk.tokens)
            if chunk.cached_tokens is not None:
                steps = f"{self._prompt_steps} steps" if self._prompt_steps != 1 else "1 step"
                self.story.tell(
                    now,
                    f"first token; the prompt took {steps}, {chunk.cached_tokens:,} of its tokens "
                    "were cached",
                )
            if chunk.finish is not None:
                self.story.tell(now, f"ends: {chunk.finish.value}, after {self._tokens:,} tokens")


def _begins(one: Sequence) -> str:
    if one.epoch:
        return f"comes back: {one.computed:,} of {len(one.tokens):,} tokens need no computing"
    return f"begins: {one.computed:,} of {len(one.tokens):,} tokens are cached"


def _why_not(engine: Engine, one: Sequence) -> tuple[str, str]:
    """(kind of the wait, why it does not run), after a step was planned."""
    scheduler = engine._scheduler
    if one in engine._handovers.parked():
        return "for its KV", "its prompt's KV is on its way from another replica"
    if len(scheduler.running) >= scheduler.places:
        return "for a place", f"all {scheduler.places} places are taken"
    first = scheduler.waiting.items[0]
    missing = _missing(scheduler, first)
    if first is not one:
        name = first.group.request.request_id
        ahead = scheduler.waiting.items.index(one)
        need = f", first {name}, which lacks {missing} blocks" if missing > 0 else ""
        return "behind others", f"{ahead} are before it{need}"
    if missing > 0:
        free = scheduler.pool.free
        return (
            "for KV blocks",
            f"it lacks {missing} blocks: {free} are free, those who run keep a part of them",
        )
    return "for the step's budget", "the step has no tokens or no time left for it"


def _missing(scheduler: Scheduler, one: Sequence) -> int:
    """As `Scheduler._shortage` reckons it, with the hashes that it has asked for."""
    size = scheduler.config.block_size
    found = scheduler.pool.match(one.digests)
    available = scheduler.pool.free - sum(scheduler.pool.refs[block] == 0 for block in found)
    for other in scheduler.running.items:
        if other.key > one.key:
            break
        available -= -(-len(other.tokens) // size) - len(other.blocks) + 1
    return -(-len(one.tokens) // size) - len(found) - available


def _stands(scheduler: Scheduler, one: Sequence) -> str:
    if scheduler.pool.free == 0 and len(one.tokens) > len(one.blocks) * scheduler.config.block_size:
        return "there is no block for its next token, and nobody less important to take it from"
    return "the step's tokens or time go to more important ones"
