"""Decisions as they are made, written down so that they can be made again.

    driver ── verb(arguments, now) ──> Watched ──> the machine itself
                                          │ Event: verb, arguments, outcome
                                          v
                                        Sink (a file, outside of the core)

A machine decides by its state, its verbs' arguments and nothing else. So its state once and then
every verb in order say it all: whoever plays them to a fresh machine (`core.replay`) must get every
outcome again. Before a new file's first event all states are written anew.

Of token ids only how many there are is written (`hide`), and what decisions hang on: the hashes of
full blocks, in the order in which they were asked for, and stop tokens that ended something.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from fabric.core.control.autoscaler import Autoscaler
from fabric.core.control.degrade import Ladder
from fabric.core.control.leases import LeaseSplit
from fabric.core.control.slo import Ledger
from fabric.core.engine.engine import Engine
from fabric.core.freeze import Freezer, Plain
from fabric.core.prefix import Hasher, NotedHasher
from fabric.core.request import Finish, Request
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.handoff import Pairing
from fabric.core.traffic.router import Router
from fabric.core.traffic.speed import TokenPace


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is watched of a kind of machine: `verbs`, attributes that are set as `inputs`, and
    `parts` of it that have verbs of their own. `looks` change nothing and decide nothing."""

    verbs: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    looks: tuple[str, ...] = ()


HANDOVER = ("export", "reserve", "landed", "give_up", "borrow", "lend")

KINDS: Mapping[type, Kind] = MappingProxyType(
    {
        Engine: Kind(
            verbs=("add", "abort", "schedule", "commit", "forward", *HANDOVER),
            looks=("snapshot", "check", "has_work", "at_work", "foretell_ns"),
        ),
        Admission: Kind(
            verbs=(
                "offer",
                "heads",
                "take",
                "requeue",
                "cancel",
                "expire",
                "completed",
                "renew",
                "demand",
            ),
            inputs=("capacity", "degradation"),
            parts=("pace",),
            looks=(
                "behind",
                "check",
                "expected_tokens",
                "predicted_wait_ns",
                "queued_by_tier",
                "queued_requests",
                "queued_tokens",
                "rank",
                "retry_after_s",
                "served_as",
            ),
        ),
        TokenPace: Kind(verbs=("add",), looks=("seconds", "FADE")),
        Router: Kind(verbs=("choose", "forget", "has_room"), looks=("check", "still_waits")),
        Pairing: Kind(
            verbs=("choose",),
            inputs=("kinds",),
            looks=("check", "still_waits", "routers"),
        ),
        Ledger: Kind(verbs=("observe", "page", "snapshot"), looks=("check",)),
        Ladder: Kind(verbs=("decide",), looks=("check", "degradation")),
        LeaseSplit: Kind(verbs=("split",), looks=("check",)),
        Autoscaler: Kind(verbs=("decide",), looks=("check",)),
    }
)

SET = "="  # an input is the verb "=" and its name


class Raised(NamedTuple):
    """What the verb raised: it was misused, or has a bug, which a replay shows again."""

    error: str


class Event(NamedTuple):
    """One verb. `noted`: hashes that it asked for; `stops`: (row or choice, token) that ended it;
    both only where tokens are hidden. Machines in the order in which they were called."""

    machine: str
    verb: str
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    outcome: Any
    noted: tuple[bytes, ...] = ()
    stops: tuple[tuple[int, int], ...] = ()


class State(NamedTuple):
    """All of a machine, before the next event."""

    machine: str
    data: Plain


class Begin(NamedTuple):
    """A new file begins here; the states of all machines follow. `lost`: entries that came before
    it and went nowhere, as the sink knows."""

    lost: int = 0


class Sink(Protocol):
    """Where entries go. `fresh`: it wants a new beginning before the next event."""

    fresh: bool

    def put(self, entry: Event | State | Begin) -> None:
        """Take an entry; what it holds does not change any more."""
        ...

    def close(self) -> None:
        """Nothing comes any more."""
        ...


T = TypeVar("T")


class Recorder:
    """Watches machines that one thread drives. `hide`: token ids are not written."""

    def __init__(self, sink: Sink, *, hide: bool = True) -> None:
        self.sink = sink
        self.hide = hide
        self._machines: dict[str, Any] = {}
        self._begun = False

    def watch(self, name: str, machine: T) -> T:
        """The same machine, with every verb written down from now on. Another one of the same name
        takes its place. `ValueError`: nothing is known of such machines."""
        kind = KINDS.get(type(machine))
        if kind is None:
            raise ValueError(f"a {type(machine).__name__} can't be watched")
        hasher = NotedHasher() if self.hide else None
        if hasher is not None:
            give_hasher(machine, hasher)
        if not self._begun:
            self._begun = True
            self.sink.put(Begin())
        self._machines[name] = machine
        self.sink.put(State(name, self._freeze(machine)))
        return cast(T, _Watched(self, name, machine, hasher))

    def begin(self) -> None:
        """All states, as they are now."""
        self.sink.fresh = False
        self.sink.put(Begin())
        if self.sink.fresh:  # no room for it: all that follows would be lost too
            return
        for name, machine in self._machines.items():
            self.sink.put(State(name, self._freeze(machine)))

    def close(self) -> None:
        """No more comes: of another engine in its place, say."""
        self.sink.close()

    def _freeze(self, machine: Any) -> Plain:
        return Freezer(hide=self.hide).freeze(machine)


def watched(recorder: Recorder | None, name: str, machine: T) -> T:
    """The machine, watched if there is somebody who watches."""
    return machine if recorder is None else recorder.watch(name, machine)


class _Watched:
    """Stands in for a machine: its verbs are written down, everything else is the machine's own."""

    def __init__(
        self, recorder: Recorder, name: str, machine: Any, hasher: NotedHasher | None
    ) -> None:
        own = self.__dict__
        own["_recorder"], own["_name"], own["_machine"] = recorder, name, machine
        kind = KINDS[type(machine)]
        own["_inputs"] = kind.inputs
        for verb in kind.verbs:
            own[verb] = _recorded(recorder, (name, verb), getattr(machine, verb), hasher)
        for part in kind.parts:
            own[part] = _Watched(recorder, f"{name}.{part}", getattr(machine, part), None)
        if hasher is not None and isinstance(machine, Engine):
            own["add"] = _recorded(recorder, (name, "add"), machine.add, hasher, machine)
            own["commit"] = _recorded(recorder, (name, "commit"), machine.commit, hasher, machine)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._machine, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._inputs:
            raise ValueError(f"{name} is nothing that a journal could write down")
        if self._recorder.sink.fresh:
            self._recorder.begin()
        setattr(self._machine, name, value)
        self._recorder.sink.put(Event(self._name, SET + name, (value,), (), None))


def _recorded(
    recorder: Recorder,
    name: tuple[str, str],
    verb: Callable[..., Any],
    hasher: NotedHasher | None,
    engine: Engine | None = None,
) -> Callable[..., Any]:
    """The verb, and then a word about it. `engine`: whose stop tokens are to be noted."""
    sink = recorder.sink
    at, called = name

    def call(*arguments: Any, **named: Any) -> Any:
        if sink.fresh:
            recorder.begin()
        rows = _rows_in_flight(engine) if engine is not None else ()
        given = tuple([tuple(one) if type(one) is list else one for one in arguments])
        try:
            outcome = verb(*arguments, **named)
        except Exception as error:
            noted = hasher.take() if hasher is not None else ()
            raised = Raised(f"{type(error).__name__}: {error}")
            sink.put(Event(at, called, given, tuple(named.items()), raised, noted))
            raise
        kept = tuple(outcome) if type(outcome) is list else outcome
        noted = hasher.take() if hasher is not None else ()
        stops = _stops(engine, arguments, kept, rows) if engine is not None else ()
        sink.put(Event(at, called, given, tuple(named.items()), kept, noted, stops))
        return outcome

    return call


def _rows_in_flight(engine: Engine) -> tuple[Any, ...]:
    """The sequences of the plan that is committed next."""
    return tuple(engine._flights[0].sequences) if engine._flights else ()


def _stops(
    engine: Engine, arguments: tuple[Any, ...], outcome: Any, rows: tuple[Any, ...]
) -> tuple[tuple[int, int], ...]:
    """Tokens that ended something: of a commit's rows, or of choices that come ended."""
    if isinstance(arguments[0], Request):
        request = arguments[0]
        stop = request.sampling.stop_token_ids
        if not request.sampling.ignore_eos:
            stop = (*stop, *engine.config.eos_token_ids)
        lasts = [(choice, tokens[-1]) for choice, tokens in enumerate(request.generated) if tokens]
        return tuple([(choice, token) for choice, token in lasts if token in stop])
    if not any(chunk.stop_token is not None for chunk in outcome):
        return ()
    return tuple(
        [(row, one.tokens[-1]) for row, one in enumerate(rows) if one.finish is Finish.STOP]
    )


def give_hasher(machine: Any, hasher: Hasher) -> None:
    """It gets the hashes of blocks from there from now on, if it asks for any."""
    if isinstance(machine, Engine):
        machine._scheduler.hasher = hasher
    elif isinstance(machine, Router):
        machine.index.hasher = hasher
    elif isinstance(machine, Pairing):
        for router in machine.routers:
            router.index.hasher = hasher
