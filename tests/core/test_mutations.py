"""Each machine sees the bugs it is there for: one is planted, and the search must find it.

A mutation replaces one method by a wrong one. The search has a bounded number of examples, always
the same ones, and does not shrink what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.autoscaler_machine import AutoscalerMachine
from kit.engine_machine import EngineMachine
from kit.planting import SEARCH, Wrong, constant, off_by, planted
from kit.pool_machine import PoolMachine
from kit.router_machine import RouterMachine
from kit.traffic_machines import AdmissionMachine, FairMachine

from fabric.core.control.autoscaler import Autoscaler
from fabric.core.engine import sequence as sequence_module
from fabric.core.engine.aging import AGED
from fabric.core.engine.blocks import BlockPool
from fabric.core.engine.engine import Engine
from fabric.core.engine.scheduler import Budget, Scheduler
from fabric.core.engine.sequence import Group, Sequence
from fabric.core.engine.writes import Writes
from fabric.core.fair import FairShare
from fabric.core.ordered import Ordered
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.admission import Admission
from fabric.core.traffic.limits import Meter
from fabric.core.traffic.lines import Line, Lines
from fabric.core.traffic.outlook import Outlook
from fabric.core.traffic.prefix_index import PrefixIndex
from fabric.core.traffic.room import Room
from fabric.core.traffic.router import Router
from fabric.core.traffic.service import Service
from fabric.core.traffic.station import Station

# (class, method, original -> wrong method): each wrong in one subtle way.


def exchanged_blocks(original: Callable[..., Any]) -> Callable[..., Any]:
    """The blocks of a table come to the host in reversed order."""

    def swap_out(self: BlockPool, blocks: list[int]) -> Any:
        copies = original(self, blocks)
        if copies is None:
            return None
        return [replace(c, source=s) for c, s in zip(copies, blocks[::-1], strict=True)]

    return swap_out


def released_at_once(original: Callable[..., Any]) -> Callable[..., Any]:
    """The blocks of an aborted sequence are free although a plan in flight names them."""

    def leave(self: Engine, sequence: Sequence, finish: Any) -> None:
        sequence.named_by = -1
        sequence.in_flight = False
        original(self, sequence, finish)

    return leave


def the_youngest_of_any_priority(_: Callable[..., Any]) -> Callable[..., Any]:
    """The victim is the latest to come, however important."""

    def preempt_behind(self: Scheduler, sequence: Sequence, work: Any) -> bool:
        victims = [s for s in self.running.items if s is not sequence and not s.in_flight]
        if not victims:
            return False
        self._preempt(max(victims, key=lambda s: s.number), work)
        return True

    return preempt_behind


def back_in_the_same_pass(original: Callable[..., Any]) -> Callable[..., Any]:
    """Sequences are admitted although somebody was preempted for want of blocks."""

    def admit_waiting(self: Scheduler, work: Any) -> None:
        work.preempted = False
        original(self, work)

    return admit_waiting


def one_token_too_many(original: Callable[..., Any]) -> Callable[..., Any]:
    """The last token is taken from the cache too, and nothing is left to compute."""

    def lookup(self: Scheduler, sequence: Sequence) -> Any:
        if sequence.host_blocks or not self.config.prefix_cache:
            return original(self, sequence)
        full = len(sequence.tokens) // self.config.block_size
        return self.pool.match(sequence.chain_of(full, self.config.block_size, self.hasher))

    return lookup


def forgetful_lru(_: Callable[..., Any]) -> Callable[..., Any]:
    """Taking a block out of the middle leaves the way back pointing at it."""

    def lru_remove(self: BlockPool, block: int) -> None:
        self._lru_next[self._lru_previous[block]] = self._lru_next[block]
        self._evictable -= 1

    return lru_remove


def first_block_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """A chain loses its beginning before its end."""
    return lambda self, blocks: original(self, list(blocks)[::-1])


def no_min_tokens(_: Callable[..., Any]) -> Callable[..., Any]:
    """`max_tokens` counts one too many."""

    def ended_by(self: Sequence) -> Any:
        done = len(self.tokens) > self.limit
        return sequence_module.Finish.LENGTH if done else None

    return ended_by


def doubled_logprobs(_: Callable[..., Any]) -> Callable[..., Any]:
    """What is computed again after a preemption is reported again."""
    return lambda self, _start, found: self.prompt_logprobs.extend(found)


def impatient(_: Callable[..., Any]) -> Callable[..., Any]:
    """Any better tier preempts at once."""
    return lambda self, other, _now: self.of_class < other.of_class


def in_the_wrong_place(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who ages keeps the old place in the queue."""

    def age(self: Scheduler, now: int) -> None:
        queued = (*self.running.items, *self.waiting.items)
        if (sequence := self._aging.find(queued, now)) is not None:
            sequence.key = (*AGED, sequence.standing.due, sequence.number)

    return age


ENGINE: list[tuple[type, str, Wrong]] = [
    (Writes, "first_is_shared", constant(False)),
    (Scheduler, "_preempt_behind", constant(False)),
    (Scheduler, "_preempt_behind", the_youngest_of_any_priority),
    (Scheduler, "_admit_waiting", back_in_the_same_pass),
    (Scheduler, "_lookup", one_token_too_many),
    (Writes, "missing", off_by(-1)),
    (Scheduler, "_shortage", off_by(3)),
    (Scheduler, "_has_row", constant(True)),
    (Budget, "grant", off_by(1)),
    (Budget, "_timed", constant(0)),
    (Sequence, "may_preempt", impatient),
    (Scheduler, "_age", in_the_wrong_place),
    (BlockPool, "swap_out", exchanged_blocks),
    (BlockPool, "release_host", constant(None)),
    (Engine, "_leave", released_at_once),
    (Engine, "_fork", constant(None)),
    (Sequence, "ended_by", no_min_tokens),
    (Group, "note_prompt_logprobs", doubled_logprobs),
]


def lost_copy(_: Callable[..., Any]) -> Callable[..., Any]:
    """A reference too few."""

    def share(self: BlockPool, blocks: list[int]) -> None:
        for block in dict.fromkeys(blocks):
            if self.refs[block] == 0:
                self._lru_remove(block)
                self.refs[block] = 1

    return share


def the_last_one_wins(_: Callable[..., Any]) -> Callable[..., Any]:
    """A block that is computed twice takes the hash over from the first."""

    def publish(self: BlockPool, block: int, digest: bytes) -> None:
        self._published[digest] = block
        self.digests[block] = digest

    return publish


POOL: list[tuple[type, str, Wrong]] = [
    (BlockPool, "_lru_remove", forgetful_lru),
    (BlockPool, "release", first_block_first),
    (BlockPool, "release_host", constant(None)),
    (BlockPool, "unpublish", constant(None)),
    (BlockPool, "share", lost_copy),
    (BlockPool, "publish", the_last_one_wins),
    (BlockPool, "swap_out", exchanged_blocks),
]


def never_late(original: Callable[..., Any]) -> Callable[..., Any]:
    """Deadlines of requests do not count, only the TTL."""

    def place(self: Admission, entry: Any, now: int) -> None:
        original(self, entry, now)
        entry.expires = now + int(self.config.queue_ttl_s * 1e9)

    return place


def kept_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """What leaves the queue leaves its tokens in the sum."""

    def remove(self: Lines, entry: Any) -> None:
        before = self.tokens_by_tier[entry.rank]
        original(self, entry)
        self.tokens_by_tier[entry.rank] = before

    return remove


def the_dearest_first(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who has to make room is looked for from the top."""

    def below(self: Lines, rank: int) -> Any:
        for lines in self._lines[rank + 1 :]:
            for line in lines.values():
                yield from line.entries

    return below


def saved_up(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who was away for long comes back with all the service that it did not want."""

    def enter(self: FairShare, name: str) -> None:
        self._counters.setdefault(name, 0.0)
        self._active[name] = None

    return enter


def all_equal(_: Callable[..., Any]) -> Callable[..., Any]:
    """Weights do not count."""

    def charge(self: FairShare, name: str, cost: float) -> None:
        self._counters[name] = self.counter(name) + cost

    return charge


def in_alphabetical_order(_: Callable[..., Any]) -> Callable[..., Any]:
    """Always the same first."""
    return lambda self: sorted(self._active)


FAIR: list[tuple[type, str, Wrong]] = [
    (FairShare, "enter", saved_up),
    (FairShare, "charge", all_equal),
    (FairShare, "order", in_alphabetical_order),
    (FairShare, "_forget_idle", constant(None)),
]


def at_the_end(_: Callable[..., Any]) -> Callable[..., Any]:
    """First come, first served, whatever the priority."""
    return lambda self, item: self.items.append(item)


ADMISSION: list[tuple[type, str, Wrong]] = [
    (Line, "ahead_of", constant(0)),
    (Service, "has_place", constant(True)),
    (Admission, "_place", never_late),
    (Room, "has_place", constant(True)),
    (Lines, "remove", kept_tokens),
    (Lines, "below", the_dearest_first),
    (Meter, "wait_s", constant(0.0)),
    (Meter, "has_place", lambda _: property(lambda _: True)),
    (Ordered, "add", at_the_end),
    (Admission, "retry_after_s", off_by(-2)),
]


def forgets_what_it_sent(_: Callable[..., Any]) -> Callable[..., Any]:
    """Any snapshot wipes the memory of what was sent, even one taken before."""

    def see(self: Station, snapshot: ReplicaSnapshot) -> None:
        self.snapshot = snapshot
        self.sent.clear()
        self._room_at.clear()

    return see


def room_as_it_was(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was sent does not change whether there is head-room, until the next snapshot."""
    return lambda self, sent: self.sent.append(sent)


ROUTER: list[tuple[type, str, Wrong]] = [
    (Station, "has_room", constant(True)),
    (Station, "see", forgets_what_it_sent),
    (Station, "send", room_as_it_was),
    (Router, "still_waits", constant(True)),
    (Outlook, "wait_ns", constant(0.0)),
    (PrefixIndex, "match", constant({})),
    (PrefixIndex, "forget", constant(None)),
]


def only_the_last_wish(original: Callable[..., Any]) -> Callable[..., Any]:
    """What was needed a moment ago is forgotten."""

    def remember(self: Autoscaler, wish: int, wanted: int, now: int) -> None:
        self._enough.clear()
        original(self, wish, wanted, now)

    return remember


def impatient(_: Callable[..., Any]) -> Callable[..., Any]:
    """A moment without work is enough to go to zero."""
    return lambda self, now: self.config.idle_s is not None and self._active != now


AUTOSCALER: list[tuple[type, str, Wrong]] = [
    (Autoscaler, "_remember", only_the_last_wish),
    (Autoscaler, "_note_change", constant(None)),
    (Autoscaler, "_has_work", constant(False)),
    (Autoscaler, "_idle", impatient),
]


MUTATIONS = [
    pytest.param(machine, *mutation, id=f"{mutation[0].__name__}.{mutation[1]}-{number}")
    for machine, mutations in (
        (EngineMachine, ENGINE),
        (PoolMachine, POOL),
        (AdmissionMachine, ADMISSION),
        (FairMachine, FAIR),
        (RouterMachine, ROUTER),
        (AutoscalerMachine, AUTOSCALER),
    )
    for number, mutation in enumerate(mutations)
]


@pytest.mark.parametrize(("machine", "owner", "method", "wrong"), MUTATIONS)
def test_a_planted_bug_is_found(
    machine: type[RuleBasedStateMachine], owner: type, method: str, wrong: Wrong
) -> None:
    with planted(owner, method, wrong), pytest.raises((AssertionError, IndexError, KeyError)):
        run_state_machine_as_test(machine, settings=SEARCH)


def test_a_hash_without_salt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_module, "root", lambda *_: b"")
    with pytest.raises(AssertionError):
        run_state_machine_as_test(EngineMachine, settings=SEARCH)
