"""`Event`s as plain data, and what differs between two of them. An engine's steps have a form of
their own, a few bytes a row: they are most of any journal."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from fabric.core.engine.plan import Sample, StepPlan, StepResult
from fabric.core.freeze import HIDDEN_TOKEN, Freezer, Plain
from fabric.core.journal import Event, Raised
from fabric.core.request import Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

# ("rows", names, rows): a list of tuples whose parts have names; ("n", (name, part, ...)): named.
STEP = ("sequence", "epoch", "start", "count", "samples", "blocks", "replace")
START = ("sequence", "epoch", "choice", "prompt_length", "blocks", "adapter")
COPY = ("kind", "source", "target")
# Without its hashes: a journal's own are sealed.
EXPORT = ("request_id", "epoch", "first", "end", "last", "slot", "blocks")
CHUNK = ("request_id", "choice", "position", "stop_token", "cached_tokens")
_step, _start, _chunk = attrgetter(*STEP), attrgetter(*START), attrgetter(*CHUNK)
_export = attrgetter(*EXPORT)
_tokens, _token = attrgetter("tokens"), attrgetter("token")
# Outcomes of which a request's id says it all.
BY_ID = ("heads", "expire")


class Packer:
    """Makes plain data of events, one after the other. `hide`: token ids are not in it."""

    def __init__(self, *, hide: bool) -> None:
        self.hide = hide
        self._freezer = Freezer(hide=hide)
        # Snapshots come again and again: the same object gives the same data, written once.
        self._snapshots: dict[str, tuple[ReplicaSnapshot, Plain]] = {}

    def arguments(self, event: Event) -> Plain:
        """What went in."""
        self._freezer.forget()
        if event.verb == "commit":
            plan, result, now = event.arguments
            return ("t", [plan.plan_id, result.plan_id, self._samples(result, event.stops), now])
        if event.verb == "forward":
            now, ends, tokens = event.arguments
            said = [("h", "t", len(one)) if self.hide else self._value(one) for one in tokens]
            return ("t", [now, self._value(ends), ("t", said)])
        return ("t", [self._value(one) for one in event.arguments])

    def named(self, event: Event) -> Plain:
        """What went in by name."""
        return [(name, self._value(value)) for name, value in event.named]

    def outcome(self, verb: str, outcome: Any) -> Plain:
        """What came out."""
        if isinstance(outcome, Raised):
            return ("raised", outcome.error)
        if isinstance(outcome, StepPlan):
            return self._plan(outcome)
        if verb in ("commit", "abort", "forward"):
            return self._chunks(outcome)
        if verb in BY_ID:
            return ("t", [request.request_id for request in outcome])
        return self._value(outcome)

    def _value(self, value: Any) -> Plain:
        if type(value) is tuple:
            return ("t", [self._value(one) for one in value])
        if type(value) is ReplicaSnapshot:
            known = self._snapshots.get(value.replica_id)
            if known is None or known[0] is not value:
                known = (value, self._freezer.freeze(value))
                self._snapshots[value.replica_id] = known
            return known[1]
        return self._freezer.freeze(value)

    def _plan(self, plan: StepPlan) -> Plain:
        count = self._count
        return (
            "n",
            (
                "plan_id",
                plan.plan_id,
                "steps",
                ("rows", STEP, list(map(_step, plan.steps))),
                "tokens",
                count([_tokens(step) for step in plan.steps]),
                "starts",
                ("rows", START, list(map(_start, plan.starts))),
                "histories",
                count([_tokens(start) for start in plan.starts]),
                "copies",
                ("rows", COPY, [(int(one.kind), one.source, one.target) for one in plan.copies]),
                "drops",
                list(plan.drops),
                "exports",
                ("rows", EXPORT, list(map(_export, plan.exports))),
            ),
        )

    def _chunks(self, chunks: Sequence[TokenChunk]) -> Plain:
        told = [one for one in chunks if one.logprobs is not None or one.prompt_logprobs]
        ended = [(i, one.finish.value) for i, one in enumerate(chunks) if one.finish is not None]
        return (
            "n",
            (
                "chunks",
                ("rows", CHUNK, list(map(_chunk, chunks))),
                "ended",
                ("rows", ("chunk", "finish"), ended),
                "tokens",
                self._count([_tokens(one) for one in chunks]),
                "logprobs",
                [self._freezer.freeze((one.logprobs, one.prompt_logprobs)) for one in told],
            ),
        )

    def _count(self, tokens: list[tuple[Any, ...]]) -> Plain:
        if self.hide:
            return list(map(len, tokens))
        return [self._freezer.freeze(one) for one in tokens]

    def _samples(self, result: StepResult, stops: tuple[tuple[int, int], ...]) -> list[Plain]:
        """Of each row its token; with what else it brought, if it did."""
        samples = result.samples
        found: list[Plain] = list(map(_token, samples))
        if self.hide:
            found = [None if token is None else HIDDEN_TOKEN for token in found]
            for row, token in stops:
                found[row] = token
        for row, sample in enumerate(samples):
            if sample.logprobs is not None or sample.prompt_logprobs:
                more = self._freezer.freeze((sample.logprobs, sample.prompt_logprobs))
                found[row] = (found[row], more)
        return found


def with_stops(request: Request, stops: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Its `generated`, where the last token of some choices is known."""
    found = list(request.generated)
    for choice, token in stops:
        found[choice] = (*found[choice][:-1], token)
    return tuple(found)


def sample_of(row: Plain, thaw: Any) -> Sample:
    """The inverse of one of `_samples`."""
    if type(row) is not tuple:
        return Sample(token=row)
    logprobs, prompt = thaw(row[1])
    return Sample(token=row[0], logprobs=logprobs, prompt_logprobs=prompt)
