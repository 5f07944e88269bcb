"""`Engine` with the scripted worker, against a specification that knows no blocks and no schedule.

What a choice must produce depends on its history, seed and choice alone, so `Expected` computes it
token by token. The worker checks every KV slot, `Engine.check` every block, and `schedule` below
what must hold of every plan: progress, importance, no block reused under a plan in flight.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit.scripted_worker import ScriptedWorker

from fabric.core.configs import EngineConfig, PreemptionCosts
from fabric.core.engine.engine import Accepted, Engine, Refused
from fabric.core.engine.plan import CopyKind, StepPlan, StepResult
from fabric.core.engine.sequence import Sequence
from fabric.core.request import Finish, Request, SamplingParams, TokenChunk
from fabric.core.tiers import BUILT_IN, Tier

VOCAB = 12
EOS = 0
MAX_FLIGHTS = 3
DRAIN_STEPS = 3000
MS = 1_000_000
# Targets that steps of 8 ms and more do come near to.
TIGHT = (
    Tier(name="interactive", ttft_ms=20, tpot_ms=10),
    Tier(name="standard", ttft_ms=100, tpot_ms=15),
    Tier(name="batch", ttft_ms=500, tpot_ms=50),
)

configs = st.builds(
    EngineConfig,
    block_size=st.integers(2, 4),
    num_blocks=st.integers(6, 12),
    num_host_blocks=st.sampled_from([20, 5, 0]),
    max_sequences=st.integers(2, 6),
    step_tokens=st.integers(4, 20),
    chunk_tokens=st.integers(2, 12),
    context_limit=st.integers(20, 40),
    prefix_cache=st.sampled_from([True, True, False]),
    eos_token_ids=st.sampled_from([(), (EOS,)]),
    micro_batches=st.sampled_from([1, 1, 1, 2]),
    preemption=st.sampled_from([PreemptionCosts(), PreemptionCosts(swap_ns_per_block=10**9)]),
    tiers=st.sampled_from([BUILT_IN, TIGHT, TIGHT]),
    patience_ns=st.sampled_from([30_000 * MS, 300 * MS]),
)

# Few different tokens and prefixes: so that blocks are really shared.
prompts = st.builds(
    lambda base, length, tail: (*(base + i % 3 for i in range(length)), *tail),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(0, 12),
    st.lists(st.integers(1, 2), min_size=1, max_size=3),
)

samplings = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([16, 9, 4, 1]),
    min_tokens=st.integers(0, 3),
    seed=st.integers(0, 3),
    prompt_logprobs=st.sampled_from([None, None, None, 1]),
    stop_token_ids=st.sampled_from([(), (), (1,)]),
    ignore_eos=st.booleans(),
    n=st.sampled_from([1, 2, 3]),
)

# Id and arrival are filled in when it is added.
asks = st.builds(
    Request,
    request_id=st.just(""),
    prompt=prompts,
    sampling=samplings,
    arrival=st.just(0),
    adapter=st.sampled_from([None, None, None, "lora"]),
    tier=st.sampled_from(["standard", "interactive", "batch", "unheard-of"]),
    priority=st.sampled_from([1, 1, 1, 0, 2]),
)

patiences = st.none() | st.integers(0, 50)


@dataclass(slots=True)
class Expected:
    """One choice as its client sees it."""

    request: Request
    choice: int
    outputs: list[int] = field(default_factory=list)
    finish: Finish | None = None
    silent: bool = False  # ended before it was resumed here: nothing comes any more
    seen: bool = False


class EngineMachine(RuleBasedStateMachine):
    """Adds, steps, up to three plans in flight, aborts and resumes, in any order."""

    @initialize(config=configs, crowd=st.lists(asks, min_size=2, max_size=6))
    def build(self, config: EngineConfig, crowd: list[Request]) -> None:
        self.config = config
        self.engine = Engine(config)
        self.worker = ScriptedWorker(config, vocab=VOCAB)
        self.flights: deque[tuple[StepPlan, StepResult, dict[int, tuple[int, ...]]]] = deque()
        self.choices: dict[tuple[str, int], Expected] = {}
        self.now = 0
        self.torn = False  # a plan was refused half way: a failure that has been seen already
        for ask in crowd:
            self.add(ask, None)

    # -- rules -----------------------------------------------------------------------------------

    @rule(ask=asks, patience_ms=patiences)
    def add(self, ask: Request, patience_ms: int | None) -> None:
        self.now += 1
        deadline = None if patience_ms is None else self.now + patience_ms * MS
        request = replace(ask, request_id=f"r{self.now}", arrival=self.now, deadline=deadline)
        prompt, sampling = request.prompt, request.sampling
        longest = min(len(prompt) + sampling.max_tokens, self.config.context_limit) - 1
        blocks = -(-longest // self.config.block_size)
        outcome = self.engine.add(request, self.now)
        if len(prompt) >= self.config.context_limit or blocks > self.config.num_blocks:
            assert isinstance(outcome, Refused), "can never run"
            return
        assert isinstance(outcome, Accepted), outcome
        for choice in range(sampling.n):
            self.choices[request.request_id, choice] = Expected(request, choice)

    @precondition(lambda self: len(self.flights) < MAX_FLIGHTS)
    @rule()
    def schedule(self) -> None:
        before = self._running()
        in_flight = [sequence for sequence in before if sequence.in_flight]
        self.torn = True
        plan = self.engine.schedule(self.now)
        if not self.flights:
            assert (plan is not None) == self.engine.has_work, "work, and nothing happens"
        after = self._running()
        self._check_preemptions(before, in_flight, after)
        if plan is None:
            self.torn = False
            return
        # Who is preempted late in a pass still counted when the first ones took their rows, beside
        # who was admitted before.
        there = len({sequence.number for sequence in (*before, *after)})
        share = -(-there // self.config.micro_batches)
        assert len(plan.steps) <= share, "more than this plan's share of the sequences"
        if not in_flight:
            assert after[0].in_flight, "the most important sequence stands still"
        result = self.worker.execute(plan)
        tables = {step.sequence: self._table(step.sequence) for step in plan.steps}
        self._check_reuse(plan, tables)
        self.flights.append((plan, result, tables))
        self.torn = False

    @precondition(lambda self: self.flights)
    @rule()
    def commit(self) -> None:
        plan, result, _ = self.flights.popleft()
        self.now += (8 + len(plan.steps)) * MS
        for chunk in self.engine.commit(plan, result, self.now):
            self._receive(chunk)

    @rule(passed_ms=st.integers(1, 400))
    def wait(self, passed_ms: int) -> None:
        self.now += passed_ms * MS

    @rule(steps=st.integers(1, 9))
    def run(self, steps: int) -> None:
        """The plain loop, so that examples get far enough for preemptions."""
        for _ in range(steps):
            if len(self.flights) < MAX_FLIGHTS:
                self.schedule()
                self.engine.check()
            if self.flights:
                self.commit()
                self.engine.check()

    @precondition(lambda self: self._open())
    @rule(data=st.data(), how=st.sampled_from(["one choice", "all choices", "resume"]))
    def disturb(self, data: st.DataObject, how: str) -> None:
        expected = data.draw(st.sampled_from(self._open()))
        if how == "resume":
            self._resume(expected.request.request_id)
        else:
            self._abort(expected, whole=how == "all choices")

    def _abort(self, expected: Expected, *, whole: bool) -> None:
        name = expected.request.request_id
        chunks = self.engine.abort(name, None if whole else expected.choice)
        ended = [other for other in self._open() if other.request.request_id == name]
        ended = [other for other in ended if whole or other is expected]
        assert sorted(chunk.choice for chunk in chunks) == [other.choice for other in ended]
        for chunk in chunks:
            assert chunk.finish is Finish.ABORT and not chunk.tokens
            self._receive(chunk)

    def _resume(self, name: str) -> None:
        """As after the loss of a replica: the same request again, with what the client has."""
        old = [self.choices.pop((name, c)) for c in range(self._of(name).sampling.n)]
        self.engine.abort(name)
        self.now += 1
        request = replace(
            old[0].request,
            request_id=f"r{self.now}",
            generated=tuple(tuple(expected.outputs) for expected in old),
            over=tuple(expected.choice for expected in old if expected.finish or expected.silent),
        )
        outcome = self.engine.add(request, self.now)
        assert isinstance(outcome, Accepted), "a choice was open"
        for expected in old:
            resumed = replace(expected, request=request, seen=bool(expected.outputs))
            self.choices[request.request_id, expected.choice] = resumed
            resumed.silent = expected.silent or expected.finish is not None

    @invariant()
    def exact(self) -> None:
        if hasattr(self, "engine"):
            self.engine.check()

    def teardown(self) -> None:
        """Everything ends within a bounded number of steps, and every gauge is at zero."""
        if not hasattr(self, "engine") or self.torn:
            return
        for _ in range(DRAIN_STEPS):
            if not self.engine.has_work and not self.flights:
                break
            self.run(1)
        assert not self._open(), "some choices never end"
        snapshot = self.engine.snapshot("r", self.now)
        assert (snapshot.running, snapshot.waiting, snapshot.swapped) == (0, 0, 0)
        assert snapshot.waiting_tokens == 0
        assert snapshot.blocks_free == snapshot.blocks_total, "device blocks are lost"
        assert snapshot.host_blocks_free == snapshot.host_blocks_total, "host blocks are lost"

    # -- what must hold --------------------------------------------------------------------------

    def _receive(self, chunk: TokenChunk) -> None:
        expected = self.choices.get((chunk.request_id, chunk.choice))
        assert expected is not None, "a chunk of nobody"
        if chunk.finish is Finish.ABORT:
            expected.finish = Finish.ABORT
            return
        assert expected.finish is None and not expected.silent, "a chunk after the end"
        assert chunk.position == len(expected.outputs), "a token lost or doubled"
        request = expected.request
        history = [*request.prompt, *expected.outputs]
        token = self.worker.script(history, len(request.prompt), request.sampling, expected.choice)
        assert chunk.tokens == (token,), "another token than alone"
        expected.outputs.append(token)
        expected.finish = chunk.finish
        assert chunk.finish is self._spec_finish(expected), "ends too early or too late"
        assert (chunk.stop_token == token) == (chunk.finish is Finish.STOP)
        self._check_first(chunk, expected)

    def _check_first(self, chunk: TokenChunk, expected: Expected) -> None:
        request = expected.request
        assert (chunk.cached_tokens is None) == expected.seen
        assert (chunk.begun is None) == expected.seen
        wanted = request.sampling.prompt_logprobs is not None and not expected.seen
        assert (chunk.prompt_logprobs is not None) == wanted
        if chunk.prompt_logprobs is not None:
            found = [entry and entry.token for entry in chunk.prompt_logprobs]
            assert found == [None, *request.prompt[1:]], "a prompt token missing or doubled"
        expected.seen = True

    def _spec_finish(self, expected: Expected) -> Finish | None:
        sampling, outputs = expected.request.sampling, expected.outputs
        stops = {*sampling.stop_token_ids}
        if not sampling.ignore_eos:
            stops.update(self.config.eos_token_ids)
        if outputs[-1] in stops and len(outputs) > sampling.min_tokens:
            return Finish.STOP
        length = len(expected.request.prompt) + len(outputs)
        full = len(outputs) == sampling.max_tokens or length == self.config.context_limit
        return Finish.LENGTH if full else None

    def _check_preemptions(
        self, before: list[Sequence], in_flight: list[Sequence], after: list[Sequence]
    ) -> None:
        assert all(sequence in after for sequence in in_flight), "preempted in flight"
        idle = [sequence for sequence in before if sequence not in in_flight]
        preempted = [sequence for sequence in idle if sequence not in after]
        admitted = [sequence for sequence in after if sequence not in before]
        for victim in preempted:
            assert any(other.key < victim.key for other in after), "preempted for nobody"
            stayed = [sequence for sequence in idle if sequence in after]
            assert all(s.key < victim.key for s in stayed), "not the least important one"
            for newcomer in admitted:
                assert newcomer.of_class < victim.of_class, "preempted for an equal"
                same = newcomer.of_class[0] == victim.of_class[0]
                patient = self.now < newcomer.standing.preempts_from
                assert not (same and patient), "preempted by one that can wait"

    def _check_reuse(self, plan: StepPlan, tables: dict[int, tuple[int, ...]]) -> None:
        """No block of a sequence in flight is written on behalf of another one."""
        size = self.config.block_size
        written = {c.target for c in plan.copies if c.kind is not CopyKind.SWAP_OUT}
        for step in plan.steps:
            first, last = step.start // size, (step.start + step.count - 1) // size
            written.update(tables[step.sequence][first : last + 1])
        for _, _, named in self.flights:
            for sequence, blocks in named.items():
                assert not written.intersection(blocks), f"blocks of {sequence} in flight reused"

    # -- what the engine holds -------------------------------------------------------------------

    def _running(self) -> list[Sequence]:
        return list(self.engine._scheduler.running.items)

    def _table(self, sequence: int) -> tuple[int, ...]:
        return tuple(self.worker.known[sequence].blocks)

    def _open(self) -> list[Expected]:
        return [e for e in self.choices.values() if e.finish is None and not e.silent]

    def _of(self, name: str) -> Request:
        return self.choices[name, 0].request
