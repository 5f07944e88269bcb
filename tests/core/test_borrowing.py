"""A prefix that one engine borrows from another: what is computed, what is told, what is found out
when a bug is planted (as in `test_mutations`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test
from kit.loan_machine import LoanMachine
from kit.planting import SEARCH, Wrong, constant, planted
from kit.router_machine import RouterMachine
from kit.scripted_worker import ScriptedWorker

from fabric.core.configs import EngineConfig, FetchConfig, RouterConfig
from fabric.core.engine.borrowing import Borrowing, KvWish
from fabric.core.engine.engine import Engine
from fabric.core.engine.handover import Expected, Handovers, Landing, arrival_of
from fabric.core.engine.plan import BlockCopy, CopyKind, KvExport
from fabric.core.request import Request, SamplingParams, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic import router
from fabric.core.traffic.fetching import Fetch
from fabric.core.traffic.router import Choice, Router

Machine = type[RuleBasedStateMachine]
SIZE = 4
PROMPT = tuple(range(1, 23))  # five blocks and two tokens


class Side:
    """An engine and its worker."""

    def __init__(self, **fields: Any) -> None:
        config = EngineConfig(block_size=SIZE, num_blocks=32, context_limit=64, **fields)
        self.engine, self.worker = Engine(config), ScriptedWorker(config)
        self.chunks: list[TokenChunk] = []

    def run(self) -> None:
        while (plan := self.engine.schedule(0)) is not None:
            result = self.worker.execute(plan)
            self.chunks += self.engine.commit(plan, result, 0)
            self.engine.check()

    def ask(self, name: str, tokens: int = 0, **sampling: Any) -> KvWish | None:
        one = Request(
            request_id=name,
            prompt=PROMPT,
            sampling=SamplingParams(**{"max_tokens": 3} | sampling),
            arrival=0,
        )
        assert self.engine.add(one, 0)
        return self.engine.borrow(name, tokens)

    def land(self, name: str, export: KvExport, holder: Side) -> Landing:
        slot = -100 - export.slot
        for index in range(export.blocks):
            self.worker.staging[slot + index] = holder.worker.staging.pop(export.slot + index)
        arrival = arrival_of(export, name, slot)
        return self.engine.landed(arrival)


@pytest.fixture
def holder() -> Side:
    """It has computed the prompt."""
    one = Side()
    one.ask("first")
    one.run()
    return one


def test_what_was_borrowed_is_not_computed(holder: Side) -> None:
    side = Side()
    wish = side.ask("r", len(PROMPT))
    assert wish is not None and (wish.first, len(wish.digests)) == (0, 5)
    assert side.engine.schedule(0) is None, "it goes on without"
    halves = (
        replace(wish, digests=wish.digests[:3]),
        replace(wish, first=12, digests=wish.digests[3:]),
    )
    exports = [holder.engine.lend(half) for half in halves]
    holder.run()
    for export in exports:
        assert export is not None
        assert side.land("r", export, holder) is Landing.LANDED
    side.run()
    assert side.engine.snapshot("", 0).prompt_tokens_total == 2
    assert side.chunks[0].cached_tokens == 20
    assert [one.tokens for one in side.chunks] == [one.tokens for one in holder.chunks]


def test_only_what_is_missing_is_asked_for(holder: Side) -> None:
    side = Side()
    wish = side.ask("r", 3 * SIZE)
    assert wish is not None and len(wish.digests) == 3
    export = holder.engine.lend(wish)
    holder.run()
    assert export is not None and side.land("r", export, holder) is Landing.LANDED
    side.run()
    assert side.engine.snapshot("", 0).prompt_tokens_total == len(PROMPT) - 3 * SIZE
    assert side.ask("again", len(PROMPT)) is None, "all is here"
    side.run()


def test_a_hole_in_the_middle_is_computed(holder: Side) -> None:
    side = Side()
    wish = side.ask("r", len(PROMPT))
    assert wish is not None
    for at in (0, 3):
        export = holder.engine.lend(
            replace(wish, first=at * SIZE, digests=wish.digests[at : at + 2])
        )
        holder.run()
        assert export is not None and side.land("r", export, holder) is Landing.LANDED
    assert side.engine.give_up("r")
    assert not side.engine.give_up("r")
    side.run()
    assert side.engine.snapshot("", 0).prompt_tokens_total == len(PROMPT) - 2 * SIZE
    assert [one.tokens for one in side.chunks] == [one.tokens for one in holder.chunks]


def test_who_can_not_use_it_does_not_wait(holder: Side) -> None:
    for side, sampling in (
        (Side(prefix_cache=False), {}),
        (Side(), {"prompt_logprobs": 0}),
    ):
        assert side.ask("r", len(PROMPT), **sampling) is None
        side.run()
        assert len(side.chunks) == 3
    with pytest.raises(ValueError, match="no such request"):
        holder.engine.borrow("nobody", 8)


def test_what_is_not_all_there_is_not_lent(holder: Side) -> None:
    wish = Side().ask("r", len(PROMPT))
    assert wish is not None
    strange = replace(wish, digests=(*wish.digests, b"?" * 16))
    assert holder.engine.lend(strange) is None
    assert holder.engine.lend(replace(wish, digests=())) is None
    assert not holder.engine.has_work


def check_a_round() -> None:
    """Three replicas in turns, each with more of one prompt than the one before."""
    config = FetchConfig(latency_ns=10, bytes_per_s=10**9, min_tokens=2)
    chooser = Router(RouterConfig(policy="round_robin", block_size=2, fetch=config))
    idle = [
        ReplicaSnapshot(
            replica_id=name, taken=0, step_ns=20, token_ns=100, kv_token_bytes=1, places=8,
            blocks_total=100, blocks_free=100,
        )
        for name in "abc"
    ]  # fmt: skip

    def send(length: int, seen: list[ReplicaSnapshot]) -> tuple[str, Fetch | None]:
        one = Request(
            request_id=f"r{length}",
            prompt=tuple(range(1, length + 1)),
            sampling=SamplingParams(max_tokens=1),
            arrival=0,
        )
        choice = chooser.choose(one, seen, 0)
        assert isinstance(choice, Choice)
        return choice.replica_id, choice.fetch

    assert send(5, idle) == ("b", None), "nobody has it"
    assert send(9, idle) == ("c", Fetch(holder_id="b", tokens=4, patience_ns=400))
    assert send(13, idle) == ("a", Fetch(holder_id="c", tokens=8, patience_ns=800)), "who has most"
    found = send(17, idle)
    assert found == ("b", Fetch(holder_id="a", tokens=12, patience_ns=800)), "4 of it are there"
    busy = [replace(one, step_ns=2000) for one in idle]
    assert send(21, busy) == ("c", None), "a step of the holder takes longer than computing it"


def test_a_prefix_is_fetched_from_who_has_most_of_it_where_that_pays() -> None:
    check_a_round()


# -- planted bugs ------------------------------------------------------------------------------


def foreign(_: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever comes is taken for what was asked for."""
    return lambda self, _expected, _arrival: Landing.LANDED


def exchanged(original: Callable[..., Any]) -> Callable[..., Any]:
    """The blocks of a run arrive in another order."""

    def lend(self: Borrowing, wish: KvWish) -> Any:
        export = original(self, wish)
        if export is not None:
            copies = self._scheduler._copies
            mine = copies[-export.blocks :]
            copies[-export.blocks :] = [
                replace(one, target=other.target)
                for one, other in zip(mine, mine[::-1], strict=True)
            ]
        return export

    return lend


def any_blocks(_: Callable[..., Any]) -> Callable[..., Any]:
    """Whatever lies in the first blocks is lent for what was wished for."""

    def lend(self: Borrowing, wish: KvWish) -> Any:
        blocks = list(range(len(wish.digests)))
        slot = self._handovers.take_slots(len(blocks))
        self._scheduler.hand_over(
            [BlockCopy(kind=CopyKind.EXPORT, source=b, target=slot + b) for b in blocks]
        )
        end = wish.first + len(blocks) * self._config.block_size
        return KvExport(
            request_id="", epoch=0, first=wish.first, end=end, last=False, slot=slot,
            blocks=len(blocks), salt=wish.salt, digest=wish.digests[-1],
        )  # fmt: skip

    return lend


def for_ever(_: Callable[..., Any]) -> Callable[..., Any]:
    """Who waits for a loan that is given up goes on waiting."""

    def drop(self: Handovers, name: str) -> bool:
        expected = self.expected.pop(name, None)
        if expected is not None:
            self._leaving.setdefault(expected.named_by, []).append(expected)
        return expected is not None

    return drop


def the_last_token_too(original: Callable[..., Any]) -> Callable[..., Any]:
    """All of a prompt is waited for, and nothing would be left to compute."""

    def borrow(self: Borrowing, sequence: Any, tokens: int) -> Any:
        sequence.prompt_length += 1
        wish = original(self, sequence, tokens)
        sequence.prompt_length -= 1
        return wish

    return borrow


def before_it_is_here(_: Callable[..., Any]) -> Callable[..., Any]:
    """Others find blocks that nothing has landed in yet."""

    def publish(self: Handovers, expected: Expected) -> None:
        for block, digest in zip(expected.blocks, expected.digests, strict=True):
            self._scheduler.pool.publish(block, digest)

    return publish


def while_it_steps(original: Callable[..., Any]) -> Callable[..., Any]:
    """A holder lends at once, whatever it does."""

    def find(config: Any, at: Any, holder: ReplicaSnapshot, **named: Any) -> Any:
        return original(config, at, replace(holder, step_ns=0), **named)

    return find


def from_the_beginning(original: Callable[..., Any]) -> Callable[..., Any]:
    """What is there already is fetched again."""
    return lambda *a, held, crowd: original(*a, held=(0, held[1]), crowd=crowd)


def who_has_least(_: Callable[..., Any]) -> Callable[..., Any]:
    """Any holder will do."""

    def best(depths: dict[str, int], but: str) -> str | None:
        return min(((d, n) for n, d in depths.items() if n != but), default=(0, None))[1]

    return best


ROUTER: list[tuple[Any, str, Wrong]] = [
    (router, "find_fetch", constant(None)),
    (router, "find_fetch", while_it_steps),
    (router, "find_fetch", from_the_beginning),
    (router, "best_holder", who_has_least),
]
LOANS: list[tuple[type, str, Wrong]] = [
    (Handovers, "_verdict", foreign),
    (Handovers, "drop", for_ever),
    (Borrowing, "lend", exchanged),
    (Borrowing, "lend", any_blocks),
    (Borrowing, "borrow", the_last_token_too),
]
# A search for these takes seconds.
RARE: list[tuple[type, str, Wrong]] = [
    (Handovers, "_publish", before_it_is_here),
    (Handovers, "stand_back", constant(False)),
]


def named(found: list[tuple[Any, str, Wrong]]) -> list[Any]:
    return [
        pytest.param(*one, id=f"{one[0].__name__.rpartition('.')[2]}.{one[1]}.{number}")
        for number, one in enumerate(found)
    ]


@pytest.mark.parametrize(("owner", "method", "wrong"), named(ROUTER))
def test_a_bug_in_the_choice_of_a_holder_is_found(owner: Any, method: str, wrong: Wrong) -> None:
    with planted(owner, method, wrong), pytest.raises(AssertionError):
        check_a_round()


@pytest.mark.parametrize(("owner", "method", "wrong"), named(LOANS))
def test_a_planted_bug_is_found(owner: type, method: str, wrong: Wrong) -> None:
    look_for(LoanMachine, owner, method, wrong)


@pytest.mark.nightly
@pytest.mark.parametrize(("owner", "method", "wrong"), named(RARE))
def test_a_rare_planted_bug_is_found(owner: type, method: str, wrong: Wrong) -> None:
    look_for(LoanMachine, owner, method, wrong)


@pytest.mark.nightly
@pytest.mark.parametrize(("owner", "method", "wrong"), named(ROUTER[:3]))
def test_the_routers_machine_finds_it_too(owner: Any, method: str, wrong: Wrong) -> None:
    look_for(RouterMachine, owner, method, wrong)


def look_for(machine: Machine, owner: Any, method: str, wrong: Wrong) -> None:
    search = settings(SEARCH, max_examples=1500)
    with planted(owner, method, wrong), pytest.raises((AssertionError, IndexError, KeyError)):
        run_state_machine_as_test(machine, settings=search)
