"""Recorded verbs, played to fresh machines: every outcome must come again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from fabric.core.engine.plan import StepPlan, StepResult
from fabric.core.freeze import Freezer, Plain, Resolve, Thawer
from fabric.core.journal import SET, Event, Raised, give_hasher
from fabric.core.packing import Packer, sample_of, with_stops
from fabric.core.prefix import Hasher, ToldHasher

LONGEST = 200  # characters of a value in a difference


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first thing that came out otherwise. `now`: the verb's, ns; None: it has none."""

    machine: str
    verb: str
    now: int | None
    where: str
    recorded: str
    replayed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """An event as it lies in a file: everything but the names is plain data."""

    machine: str
    verb: str
    arguments: Plain
    named: Plain
    outcome: Plain
    noted: tuple[bytes, ...] = ()
    stops: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """A verb with its arguments and outcome as they are in this process. `now`: as in
    `Difference`."""

    machine: str
    verb: str
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    outcome: Any
    now: int | None


class Replay:
    """The machines of one journal. `hide`: it was written without token ids."""

    def __init__(self, resolve: Resolve, *, hide: bool) -> None:
        self.hide = hide
        self.machines: dict[str, Any] = {}
        self.played: Played | None = None  # the last one
        # Whoever looks on is called before each verb, with the machine as it was.
        self.before: Callable[[Any, Verb, tuple[Any, ...]], None] | None = None
        self._resolve = resolve
        self._hashers: dict[str, Hasher] = {}
        self._packer = Packer(hide=hide)

    def state(self, name: str, data: Plain, *, continued: bool) -> Difference | None:
        """A machine as it was recorded. `continued`: what came before is known, so one that is
        there must be in the very same state."""
        found = None
        if continued and name in self.machines:
            mine = Freezer(hide=self.hide).freeze(self.machines[name])
            found = self._differs(name, "state", None, data, mine)
        hasher: Hasher = ToldHasher() if self.hide else Hasher()
        machine = Thawer(self._resolve, hasher).thaw(data)
        give_hasher(machine, hasher)
        self.machines[name], self._hashers[name] = machine, hasher
        return found

    def event(self, verb: Verb) -> Difference | None:
        """Do it again and compare. `ValueError`: there is no such machine."""
        machine, hasher = self._machine(verb.machine)
        thaw = Thawer(self._resolve, Hasher()).thaw
        arguments = self._arguments(verb, thaw)
        named = {name: thaw(value) for name, value in verb.named}
        if verb.verb.startswith(SET):
            setattr(machine, verb.verb.removeprefix(SET), arguments[0])
            self._note(verb, arguments, named, None, None)
            return None
        if isinstance(hasher, ToldHasher):
            hasher.tell(verb.noted)
        now = _now_of(type(machine), verb.verb, arguments, named)
        if self.before is not None:
            self.before(machine, verb, arguments)
        try:
            outcome = getattr(machine, verb.verb)(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - what was raised then is raised again
            outcome = Raised(f"{type(error).__name__}: {error}")
        if type(outcome) is list:
            outcome = tuple(outcome)
        self._note(verb, arguments, named, outcome, now)
        mine = self._packer.outcome(verb.verb, outcome)
        found = self._differs(verb.machine, verb.verb, now, verb.outcome, mine)
        if found is None and isinstance(hasher, ToldHasher) and hasher.left():
            asked = len(verb.noted)
            return Difference(
                machine=verb.machine,
                verb=verb.verb,
                now=now,
                where="hashes that were asked for",
                recorded=str(asked),
                replayed=str(asked - hasher.left()),
            )
        return found

    def _machine(self, name: str) -> tuple[Any, Hasher]:
        """By name; "admission.pace" is a part of "admission"."""
        if name in self.machines:
            return self.machines[name], self._hashers[name]
        whole, _, part = name.rpartition(".")
        if whole not in self.machines:
            raise ValueError(f"the journal speaks of {name} before it says what it is")
        return getattr(self.machines[whole], part), Hasher()

    def _arguments(self, verb: Verb, thaw: Callable[[Plain], Any]) -> tuple[Any, ...]:
        if verb.verb == "commit":
            plan_id, result_id, rows, now = verb.arguments[1]
            samples = tuple([sample_of(row, thaw) for row in rows])
            result = StepResult(plan_id=result_id, samples=samples)
            return StepPlan(plan_id=plan_id, steps=()), result, now
        arguments: tuple[Any, ...] = thaw(verb.arguments)
        if verb.verb == "add" and verb.stops:
            request = arguments[0]
            request = replace(request, generated=with_stops(request, verb.stops))
            return (request, *arguments[1:])
        return arguments

    def _note(
        self,
        verb: Verb,
        arguments: tuple[Any, ...],
        named: dict[str, Any],
        outcome: Any,
        now: int | None,
    ) -> None:
        self.played = Played(
            machine=verb.machine,
            verb=verb.verb,
            arguments=arguments,
            named=named,
            outcome=outcome,
            now=now,
        )

    def _differs(
        self, machine: str, verb: str, now: int | None, recorded: Plain, replayed: Plain
    ) -> Difference | None:
        if recorded == replayed:
            return None
        found = _first(recorded, replayed, "", self._resolve)
        if found is None:  # not a number, in the same place
            return None
        where, one, other = found
        return Difference(
            machine=machine,
            verb=verb,
            now=now,
            where=where.lstrip(".") or "outcome",
            recorded=_short(one),
            replayed=_short(other),
        )


def verb_of(event: Event, packer: Packer) -> Verb:
    """An event as it is written."""
    return Verb(
        machine=event.machine,
        verb=event.verb,
        arguments=packer.arguments(event),
        named=packer.named(event),
        outcome=packer.outcome(event.verb, event.outcome),
        noted=event.noted,
        stops=event.stops,
    )


Found = tuple[str, Plain, Plain]


def _first(one: Plain, other: Plain, path: str, resolve: Resolve) -> Found | None:
    """The first part that differs: where, and both values. None: none does."""
    if type(one) is not type(other) or type(one) not in (tuple, list):
        return None if repr(one) == repr(other) else (path, one, other)
    if type(one) is tuple and one[:1] == other[:1] and one:
        named = _named(one, other, path, resolve)
        if named is not None:
            return _first_of(named, resolve)
    pairs = [
        (f"{path}[{index}]", *both) for index, both in enumerate(zip(one, other, strict=False))
    ]
    found = _first_of(pairs, resolve)
    if found is None and len(one) != len(other):
        return f"length of {path.lstrip('.') or 'outcome'}", len(one), len(other)
    return found


def _first_of(pairs: Sequence[Found], resolve: Resolve) -> Found | None:
    for path, mine, yours in pairs:
        found = _first(mine, yours, path, resolve)
        if found is not None:
            return found
    return None


def _named(one: Plain, other: Plain, path: str, resolve: Resolve) -> list[Found] | None:
    """Pairs of parts that have names; None: it has none, or is of another kind."""
    tag = one[0]
    if tag == "v" and one[1] == other[1]:
        names = [field.name for field in fields(resolve(one[1]))]
        return [
            (f"{path}.{name}", *both)
            for name, both in zip(names, zip(one[2], other[2], strict=True), strict=True)
        ]
    if tag == "o" and one[2] == other[2] and one[3][::2] == other[3][::2]:
        values = zip(one[3][::2], one[3][1::2], other[3][1::2], strict=True)
        return [(f"{path}.{name}", mine, yours) for name, mine, yours in values]
    if tag == "n":
        values = zip(one[1][::2], one[1][1::2], other[1][1::2], strict=True)
        return [(f"{path}.{name}", mine, yours) for name, mine, yours in values]
    if tag == "rows" and len(one[2]) == len(other[2]):
        found = []
        for index, (mine, yours) in enumerate(zip(one[2], other[2], strict=True)):
            for name, part, your in zip(one[1], mine, yours, strict=True):
                found.append((f"{path}[{index}].{name}", part, your))
        return found
    if tag in ("t", "l", "s") and len(one) == len(other):
        return [(path, one[-1], other[-1])]
    return None


def _now_of(kind: type, verb: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> int | None:
    place = _place_of_now(kind, verb)
    found = named.get("now", arguments[place] if 0 <= place < len(arguments) else None)
    return found if type(found) is int else None


@cache
def _place_of_now(kind: type, verb: str) -> int:
    """Among a verb's arguments; -1: it has no time."""
    code = getattr(getattr(kind, verb, None), "__code__", None)
    names = code.co_varnames[1 : code.co_argcount] if code is not None else ()
    return names.index("now") if "now" in names else -1


def _short(value: Plain) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
