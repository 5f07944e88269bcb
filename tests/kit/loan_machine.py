"""Two engines that lend each other prefixes: the right tokens, whatever becomes of a loan.

Both compute prompts and outputs. Whoever is asked may have a prompt's beginning from the other one.
What is lent may come late, twice, mixed up or never; the borrower's worker must find the right
history in every block, and both pools must be empty in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_machine import MS, VOCAB, prompts
from kit.handover_machine import DRAIN_STEPS, configs
from kit.scripted_worker import ScriptedWorker

from fabric.core.configs import EngineConfig
from fabric.core.engine.borrowing import KvWish
from fabric.core.engine.engine import Accepted, Engine
from fabric.core.engine.handover import WRONG, Landing, arrival_of
from fabric.core.engine.plan import KvExport
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk

asks = st.builds(
    Request,
    request_id=st.just(""),
    prompt=prompts,
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([2, 6, 12]),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
        n=st.sampled_from([1, 1, 2]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
    ),
    arrival=st.just(0),
    adapter=st.sampled_from([None, None, "lora"]),
    tenant=st.sampled_from(["", "", "other"]),
    priority=st.sampled_from([1, 1, 0]),
)


class Side:
    """An engine, its worker, and its clients."""

    def __init__(self, config: EngineConfig) -> None:
        self.engine = Engine(config)
        self.worker = ScriptedWorker(config, vocab=VOCAB)
        self.clients: dict[str, Client] = {}
        self.lent: list[Loan] = []  # until a step has copied it
        self.next_slot = 0


@dataclass(slots=True, kw_only=True)
class Client:
    """One request: tokens by choice, and those choices that have ended."""

    request: Request
    outputs: dict[int, list[int]] = field(default_factory=dict)
    finished: dict[int, Finish] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Something of it is still to come."""
        return len(self.finished) < self.request.sampling.n


@dataclass(slots=True, kw_only=True)
class Loan:
    """On its way to `borrower`, for a request there."""

    request_id: str
    borrower: Side
    export: KvExport
    rows: list[list[int]] = field(default_factory=list)


class LoanMachine(RuleBasedStateMachine):
    """Requests at both engines, in any order of everything."""

    @initialize(config=configs)
    def build(self, config: EngineConfig) -> None:
        self.config = config
        self.sides = Side(config), Side(config)
        self.wishes: list[tuple[Side, str, KvWish]] = []
        self.network: list[Loan] = []
        self.number = 0

    # -- rules -----------------------------------------------------------------------------------

    @rule(ask=asks, at=st.integers(0, 1), most=st.integers(1, 4))
    def ask_both(self, ask: Request, at: int, most: int) -> None:
        """One computes it, and then lends it to the other one."""
        self._ask(ask, at, 0)
        for _ in range(6):
            self._step(self.sides[at])
        self._ask(ask, 1 - at, 40)
        if self.wishes:
            self._lend(len(self.wishes) - 1, most)
            self._step(self.sides[at])

    @rule(ask=asks, at=st.integers(0, 1), tokens=st.sampled_from([40, 40, 9, 4, 0]))
    def ask(self, ask: Request, at: int, tokens: int) -> None:
        self._ask(ask, at, tokens)

    def _ask(self, ask: Request, at: int, tokens: int) -> None:
        self.number += 1
        name, side = f"r{self.number}", self.sides[at]
        request = replace(ask, request_id=name, arrival=self.number * MS)
        if not isinstance(side.engine.add(request, self._now()), Accepted):
            return
        side.clients[name] = Client(request=request)
        wish = side.engine.borrow(name, tokens)
        if wish is not None:
            end = wish.first + len(wish.digests) * self.config.block_size
            assert end <= min(tokens, len(request.prompt) - 1), "more than it asked for"
            self.wishes.append((side, name, wish))

    @rule(steps=st.integers(1, 5), at=st.integers(0, 1))
    def run(self, steps: int, at: int) -> None:
        for _ in range(steps):
            self._step(self.sides[at])

    @precondition(lambda self: self.wishes)
    @rule(data=st.data(), most=st.integers(1, 4), steps=st.integers(0, 2))
    def lend(self, data: st.DataObject, most: int, steps: int) -> None:
        holder = self._lend(data.draw(st.integers(0, len(self.wishes) - 1)), most)
        for _ in range(steps):
            self._step(holder)

    def _lend(self, index: int, most: int) -> Side:
        """The holder is asked for it in runs of so many blocks."""
        side, name, wish = self.wishes.pop(index)
        holder, size = self.sides[side is self.sides[0]], self.config.block_size
        for at in range(0, len(wish.digests), most):
            run = replace(wish, first=wish.first + at * size, digests=wish.digests[at : at + most])
            export = holder.engine.lend(run)
            if export is not None:
                assert export.end - export.first == len(run.digests) * size
                holder.lent.append(Loan(request_id=name, borrower=side, export=export))
        return holder

    @precondition(lambda self: self.network)
    @rule(data=st.data(), what=st.sampled_from(["right"] * 4 + ["twice", "lost"]))
    def deliver(self, data: st.DataObject, what: str) -> None:
        index = data.draw(st.integers(0, len(self.network) - 1))
        loan = self.network[index]
        if what != "twice":
            del self.network[index]
        if what != "lost":
            assert self._land(loan) not in WRONG, "what is right was refused"

    @precondition(lambda self: len(self.network) > 1)
    @rule(data=st.data(), fields=st.sampled_from(["request", "range", "content"]))
    def swap(self, data: st.DataObject, fields: str) -> None:
        """One loan comes with something of another one."""
        mine = data.draw(st.sampled_from(self.network))
        other = data.draw(st.sampled_from([one for one in self.network if one is not mine]))
        export = mine.export
        if fields == "request":
            mixed = replace(mine, request_id=other.request_id, borrower=other.borrower)
        elif fields == "range":
            mixed = replace(
                mine, export=replace(export, first=other.export.first, end=other.export.end)
            )
        else:
            named = replace(export, digest=other.export.digest, salt=other.export.salt)
            mixed = replace(mine, export=named, rows=other.rows)
        # Where a run of the same prompt begins is no part of the hash: the checksum covers it.
        blocks = (mixed.export.end - mixed.export.first) // self.config.block_size
        same_end = other.export.end == export.end and other.export.first != export.first
        if len(mixed.rows) < blocks or same_end:
            return
        outcome = self._land(replace(mixed, rows=mixed.rows[:blocks]))
        if outcome is Landing.LANDED:  # equal beginnings: what the hash covers is the same
            assert mixed.export.digest == export.digest
            assert (mixed.export.first, mixed.export.end) == (export.first, export.end)

    @precondition(lambda self: self._open())
    @rule(data=st.data(), how=st.sampled_from(["give up", "abort", "abort a choice"]))
    def disturb(self, data: st.DataObject, how: str) -> None:
        side, client = data.draw(st.sampled_from(self._open()))
        name = client.request.request_id
        if how == "give up":
            side.engine.give_up(name)
            return
        for chunk in side.engine.abort(name, 0 if how == "abort a choice" else None):
            client.finished[chunk.choice] = Finish.ABORT

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "config"):
            for side in self.sides:
                side.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "config"):
            return
        for side in self.sides:
            for name in side.clients:
                side.engine.give_up(name)
            for _ in range(DRAIN_STEPS):
                if not side.engine.has_work:
                    break
                self._step(side)
        assert not self._open(), "some requests never end"
        for side in self.sides:
            snapshot = side.engine.snapshot("r", self._now())
            assert snapshot.running == snapshot.waiting == snapshot.swapped == 0
            assert snapshot.blocks_free == snapshot.blocks_total, "blocks are lost"
            assert not side.worker.staging and not side.lent, "slots are lost"

    # -- what happens ----------------------------------------------------------------------------

    def _step(self, side: Side) -> None:
        had_work = side.engine.has_work
        plan = side.engine.schedule(self._now())
        assert (plan is not None) == had_work, "work, and nothing happens"
        if plan is None:
            return
        result = side.worker.execute(plan)
        for loan in side.lent:  # all that was lent before this step is in its slots now
            export = loan.export
            slots = range(export.slot, export.slot + export.blocks)
            loan.rows = [side.worker.staging.pop(slot) for slot in slots]
        self.network += side.lent
        side.lent = []
        for chunk in side.engine.commit(plan, result, self._now()):
            self._receive(chunk, side)

    def _land(self, loan: Loan) -> Landing:
        side, export = loan.borrower, loan.export
        # Slots of a worker are used once: what comes is far from what leaves.
        slot = side.next_slot = side.next_slot - len(loan.rows)
        for index, row in enumerate(loan.rows):
            side.worker.staging[slot + index] = list(row)
        arrival = arrival_of(export, loan.request_id, slot)
        outcome = side.engine.landed(arrival)
        if outcome is not Landing.LANDED:
            for index in range(len(loan.rows)):
                del side.worker.staging[slot + index]
        return outcome

    def _receive(self, chunk: TokenChunk, side: Side) -> None:
        client = side.clients[chunk.request_id]
        outputs = client.outputs.setdefault(chunk.choice, [])
        assert chunk.choice not in client.finished, "a chunk after the end"
        assert chunk.position == len(outputs), "a token lost or doubled"
        request = client.request
        history = [*request.prompt, *outputs]
        token = side.worker.script(history, len(request.prompt), request.sampling, chunk.choice)
        assert chunk.tokens == (token,), "another token than alone"
        outputs.append(token)
        if chunk.finish is not None:
            client.finished[chunk.choice] = chunk.finish

    def _open(self) -> list[tuple[Side, Client]]:
        return [(side, one) for side in self.sides for one in side.clients.values() if one.open]

    def _now(self) -> int:
        return self.number * MS
