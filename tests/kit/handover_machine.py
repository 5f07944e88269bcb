"""Two engines and a network that delays, swaps, doubles and loses what one sends the other.

The prefill engine computes prompts and their first token; their KV travels in groups. Whatever
arrives, the decode engine's worker must find the right history in every block, clients must get
the tokens that they would have got from one engine, and both pools must be empty in the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.engine_machine import EOS, MS, VOCAB, prompts
from kit.scripted_worker import ScriptedWorker

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.core.engine.engine import NO_ROOM, Accepted, Engine, Refused
from fabric.core.engine.handover import WRONG, Landing, arrival_of
from fabric.core.engine.plan import KvExport
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk

DRAIN_STEPS = 2000

configs = st.builds(
    EngineConfig,
    block_size=st.integers(2, 4),
    num_blocks=st.integers(10, 20),
    num_host_blocks=st.sampled_from([10, 0]),
    max_sequences=st.integers(2, 5),
    step_tokens=st.integers(5, 20),
    chunk_tokens=st.integers(2, 8),
    context_limit=st.integers(24, 40),
    prefix_cache=st.sampled_from([True, True, False]),
    eos_token_ids=st.sampled_from([(), (EOS,)]),
    preemption=st.sampled_from([PreemptionCosts(), PreemptionCosts(swap_ns_per_block=10**9)]),
    group_tokens=st.sampled_from([1, 4, 128]),
)
asks = st.builds(
    Request,
    request_id=st.just(""),
    prompt=prompts,
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.sampled_from([12, 6, 2]),
        seed=st.integers(0, 3),
        ignore_eos=st.booleans(),
    ),
    arrival=st.just(0),
    adapter=st.sampled_from([None, None, "lora"]),
    tenant=st.sampled_from(["", "", "other"]),
    priority=st.sampled_from([1, 1, 0]),
)


@dataclass(slots=True, kw_only=True)
class Client:
    """One request as its client sees it."""

    request: Request
    epoch: int
    outputs: list[int] = field(default_factory=list)
    finish: Finish | None = None
    decoding: bool = False
    prefilled: bool = False  # its first token came from the prefill engine


@dataclass(slots=True, kw_only=True)
class Side:
    """An engine and its worker."""

    engine: Engine
    worker: ScriptedWorker


class HandoverMachine(RuleBasedStateMachine):
    """Requests through both engines, in any order of everything."""

    @initialize(config=configs)
    def build(self, config: EngineConfig) -> None:
        self.config = config
        self.prefill, self.decode = (
            Side(engine=Engine(config), worker=ScriptedWorker(config, vocab=VOCAB))
            for _ in range(2)
        )
        self.clients: dict[str, Client] = {}
        self.network: list[tuple[KvExport, list[list[int]]]] = []
        self.number = 0
        self.next_slot = 0
        self.sent: dict[str, int] = {}  # tokens of a prompt whose KV has left

    # -- rules -----------------------------------------------------------------------------------

    @rule(ask=asks, detour=st.sampled_from([True, True, True, False]))
    def ask(self, ask: Request, detour: bool) -> None:
        self.number += 1
        request = replace(ask, request_id=f"r{self.number}", arrival=self.number * MS)
        client = Client(request=request, epoch=self.number)
        if not detour:
            if isinstance(self.decode.engine.add(request, self._now()), Accepted):
                self.clients[request.request_id] = replace(client, decoding=True)
            return
        leg = replace(request, sampling=replace(request.sampling, max_tokens=1))
        if not isinstance(self.prefill.engine.add(leg, self._now()), Accepted):
            return
        self.prefill.engine.export(request.request_id, client.epoch)
        outcome = self.decode.engine.reserve(request, client.epoch)
        if isinstance(outcome, Refused) and outcome.reason != NO_ROOM:  # can never run there
            self.prefill.engine.abort(request.request_id)
            return
        self.clients[request.request_id] = client

    @rule(steps=st.integers(1, 5), decode=st.booleans())
    def run(self, steps: int, decode: bool) -> None:
        for _ in range(steps):
            self._step(self.decode if decode else self.prefill)

    @precondition(lambda self: self.network)
    @rule(data=st.data(), what=st.sampled_from(["right"] * 4 + ["twice", "lost", "epoch"]))
    def deliver(self, data: st.DataObject, what: str) -> None:
        index = data.draw(st.integers(0, len(self.network) - 1))
        export, rows = self.network[index]
        if what != "twice":
            del self.network[index]
        if what == "lost":
            return
        outcome = self._land(replace(export, epoch=export.epoch - (what == "epoch")), rows)
        assert outcome not in WRONG, "what is right was refused"
        if what == "epoch":
            assert outcome in {Landing.EPOCH, Landing.UNKNOWN}

    @precondition(lambda self: len(self.network) > 1)
    @rule(data=st.data(), fields=st.sampled_from(["request", "range", "content"]))
    def swap(self, data: st.DataObject, fields: str) -> None:
        """One group comes with something of another one."""
        pairs = st.sampled_from(self.network)
        (export, rows), (other, other_rows) = data.draw(pairs), data.draw(pairs)
        if fields == "request":
            mixed = replace(export, request_id=other.request_id, epoch=other.epoch)
        elif fields == "range":
            mixed = replace(export, first=other.first, end=other.end)
        else:
            mixed, rows = replace(export, digest=other.digest, salt=other.salt), other_rows
        # Where a run of the same prompt begins is no part of the hash: the checksum covers it.
        if len(rows) < mixed.blocks or (other.end == export.end and other.first != export.first):
            return
        size = self.config.block_size
        outcome = self._land(mixed, rows[: -(-mixed.end // size) - mixed.first // size])
        if outcome is Landing.LANDED:  # equal prompts: what the hash covers is the same
            alike = mixed.digest == export.digest
            assert alike and (mixed.first, mixed.end) == (export.first, export.end)

    @precondition(lambda self: self._sampled())
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        self._decode(data.draw(st.sampled_from(self._sampled())))

    @precondition(lambda self: self._open())
    @rule(data=st.data(), how=st.sampled_from(["give up", "abort", "prefill dies"]))
    def disturb(self, data: st.DataObject, how: str) -> None:
        client = data.draw(st.sampled_from(self._open()))
        name = client.request.request_id
        if how == "give up":
            self.decode.engine.give_up(name)
        elif how == "abort":
            self.prefill.engine.abort(name)
            self.decode.engine.abort(name)
            client.finish = Finish.ABORT
        elif not client.outputs and not client.decoding:
            self.prefill.engine.abort(name)
            self.decode.engine.give_up(name)
            self._decode(client)

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "config"):
            self.prefill.engine.check()
            self.decode.engine.check()

    def teardown(self) -> None:
        if not hasattr(self, "config"):
            return
        for _ in range(DRAIN_STEPS):
            for client in self._sampled():
                self._decode(client)
            for name in self.clients:
                self.decode.engine.give_up(name)
            if not (self.prefill.engine.has_work or self.decode.engine.has_work):
                break
            self._step(self.prefill)
            self._step(self.decode)
        assert not self._open(), "some requests never end"
        for name, client in self.clients.items():
            if client.prefilled and client.finish is not Finish.ABORT:
                assert self.sent.get(name) == len(client.request.prompt), "KV that never left"
        for side in (self.prefill, self.decode):
            snapshot = side.engine.snapshot("r", self._now())
            assert snapshot.running == snapshot.waiting == snapshot.swapped == 0
            assert snapshot.blocks_free == snapshot.blocks_total, "blocks are lost"
            assert not side.worker.staging, "slots are lost"

    # -- what happens ----------------------------------------------------------------------------

    def _step(self, side: Side) -> None:
        had_work = side.engine.has_work
        plan = side.engine.schedule(self._now())
        assert (plan is not None) == had_work, "work, and nothing happens"
        if plan is None:
            return
        result = side.worker.execute(plan)
        for export in plan.exports:
            slots = range(export.slot, export.slot + export.blocks)
            rows = [side.worker.staging.pop(slot) for slot in slots]
            if export.end % self.config.block_size:  # what was not written is not told
                used = export.end % self.config.block_size
                rows[-1][used:] = [0] * (len(rows[-1]) - used)
            self.network.append((export, rows))
            assert export.first == self.sent.get(export.request_id, 0), "a gap, or told twice"
            self.sent[export.request_id] = export.end
        for chunk in side.engine.commit(plan, result, self._now()):
            self._receive(chunk, side)

    def _land(self, export: KvExport, rows: list[list[int]]) -> Landing:
        slot, self.next_slot = self.next_slot, self.next_slot + len(rows)
        for index, row in enumerate(rows):
            self.decode.worker.staging[slot + index] = list(row)
        arrival = arrival_of(export, export.request_id, slot)
        outcome = self.decode.engine.landed(arrival)
        if outcome is not Landing.LANDED:
            for index in range(len(rows)):
                del self.decode.worker.staging[slot + index]
        return outcome

    def _decode(self, client: Client) -> None:
        client.decoding = True
        request = replace(client.request, generated=(tuple(client.outputs),))
        assert isinstance(self.decode.engine.add(request, self._now()), Accepted)

    def _receive(self, chunk: TokenChunk, side: Side) -> None:
        client = self.clients[chunk.request_id]
        assert client.finish is None, "a chunk after the end"
        assert client.decoding == (side is self.decode), "from the wrong engine"
        assert chunk.position == len(client.outputs), "a token lost or doubled"
        request = client.request
        history = [*request.prompt, *client.outputs]
        token = side.worker.script(history, len(request.prompt), request.sampling, 0)
        assert chunk.tokens == (token,), "another token than alone"
        client.outputs.append(token)
        client.prefilled |= side is self.prefill
        length = len(history) + 1 == self.config.context_limit
        if chunk.finish is Finish.LENGTH and side is self.prefill and not length:
            return  # the leg ends, not the request
        client.finish = chunk.finish

    def _sampled(self) -> list[Client]:
        return [one for one in self._open() if one.outputs and not one.decoding]

    def _open(self) -> list[Client]:
        return [one for one in self.clients.values() if one.finish is None]

    def _now(self) -> int:
        return self.number * MS
