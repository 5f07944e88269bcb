"""The engine of one replica: requests in, step plans out, results in, token chunks out.

    add ──> waiting ──schedule──> running ──commit──> chunks ... finish
               ^                     │
               └─────── preempt ─────┘        abort: from anywhere

A driver's loop: `plan = engine.schedule(now)`, `result = workers.execute(plan)`,
`chunks = engine.commit(plan, result, now)`. More plans may be scheduled before the first is
committed (a pipeline); they must be committed in order. A sequence is in one plan at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from fabric.core.configs import EngineConfig
from fabric.core.engine.audit import audit
from fabric.core.engine.borrowing import Borrowing, KvWish
from fabric.core.engine.counters import Counters
from fabric.core.engine.door import why_never
from fabric.core.engine.forward import forward
from fabric.core.engine.gauges import take_snapshot
from fabric.core.engine.handover import Handovers, Holder, KvArrival, Landing, Leaving
from fabric.core.engine.pace import Load, load_of
from fabric.core.engine.plan import KvExport, Sample, StepPlan, StepResult
from fabric.core.engine.scheduler import Scheduler
from fabric.core.engine.sequence import Group, Sequence
from fabric.core.engine.standing import Standings
from fabric.core.quick import halves
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot

NO_ROOM = "no room for the prompt's KV"


_blank_chunk, _fill_chunk = halves(TokenChunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request is in. Each of its choices that is not over yet will end in one `finish`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The request can never run here. `reason` is a sentence for the client."""

    reason: str


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan under way, the sequences of its rows, and when it was made (ns)."""

    plan: StepPlan
    sequences: list[Sequence]
    scheduled: int


class Engine:
    """Continuous batching over paged KV blocks. See `Scheduler` for who runs when.

    Every verb takes `now` (ns), the clock of whoever drives: it tells how long steps take, and who
    is about to miss a target.
    """

    def __init__(self, config: EngineConfig) -> None:
        if min(config.block_size, config.max_sequences, config.step_tokens) < 1:
            raise ValueError("block_size, max_sequences and step_tokens must be at least 1")
        if min(config.chunk_tokens, config.micro_batches) < 1:
            raise ValueError("chunk_tokens and micro_batches must be at least 1")
        self.config = config
        self._counters = Counters()
        self._scheduler = Scheduler(config, self._counters)
        self._standings = Standings(config.tiers)
        self._groups: dict[str, Group] = {}
        self._flights: deque[Flight] = deque()
        # Finished or aborted, but named by a plan that has not committed: plan id -> sequences.
        self._leaving: Leaving = {}
        self._handovers = Handovers(config, self._scheduler, self._leaving)
        self._loans = Borrowing(config, self._scheduler, self._handovers)
        self._next_plan = 0
        self._next_number = 0
        self._committed = -1
        self._last_commit = 0  # ns

    @property
    def has_work(self) -> bool:
        """A sequence waits or runs (perhaps in flight), or KV is to be copied. What waits for KV
        that has not come yet is none."""
        scheduler = self._scheduler
        return bool(scheduler.running.items or scheduler.waiting.items or scheduler.must_copy)

    def foretell_ns(self, plan: StepPlan) -> int:
        """How long a step of this plan should take."""
        return round(self._scheduler.pace.step_ns(load_of(plan)))

    def at_work(self) -> tuple[str, ...]:
        """Requests in the oldest plan under way: the one that the workers are in."""
        sequences = self._flights[0].sequences if self._flights else []
        return tuple(dict.fromkeys(one.group.request.request_id for one in sequences))

    def add(self, request: Request, now: int) -> Accepted | Refused:
        """Take a request in, or say why it can never run here. What is over stays silent."""
        problem = self._problem(request)
        if problem is not None:
            return Refused(reason=problem)
        group = Group(request, self._standings.of(request))
        for choice in range(request.sampling.n):
            if choice in request.over:
                continue
            sequence = Sequence(group, choice, self._next_number, self.config)
            self._next_number += 1
            if sequence.reported and sequence.ended_by():
                self._handovers.drop(request.request_id)
                return Refused(reason=f"choice {choice} of the resumed request has ended before")
            group.unborn[choice] = sequence
        self._groups[request.request_id] = group
        if group.standing.rank == 0:
            self._scheduler.expect_first(now)
        primary = group.next_primary()
        if not self._handovers.claim(primary):
            self._scheduler.waiting.add(primary)
        return Accepted()

    def export(self, request_id: str, epoch: int) -> None:
        """Hand the KV of a request's prompt over as it is computed: see `StepPlan.exports`.

        `ValueError`: there is no such request, or it has several choices."""
        group = self._groups.get(request_id)
        if group is None:
            raise ValueError("no such request")
        self._handovers.export(group, epoch)

    def reserve(self, request: Request, epoch: int) -> Accepted | Refused:
        """Keep blocks for a prompt whose KV another engine computes. `add` takes them over,
        `abort` gives them back."""
        problem = self._problem(request)
        if problem is not None:
            return Refused(reason=problem)
        room = self._handovers.reserve(request, epoch)
        return Accepted() if room else Refused(reason=NO_ROOM)

    def landed(self, arrival: KvArrival) -> Landing:
        """KV has come and lies in the staging slots: the next plan copies it, if it is right."""
        return self._handovers.landed(arrival, self._next_plan)

    def give_up(self, request_id: str) -> bool:
        """No more KV will come: what has not landed is computed here. False: none was expected."""
        return self._handovers.drop(request_id)

    def borrow(self, request_id: str, tokens: int) -> KvWish | None:
        """A request that was just added waits until `tokens` of its prompt have landed; which are
        not here. None: it waits for nothing. `ValueError`: there is no such request."""
        group = self._groups.get(request_id)
        if group is None or group.primary not in group.live:
            raise ValueError("no such request")
        return self._loans.borrow(group.live[group.primary], tokens)

    def lend(self, wish: KvWish) -> KvExport | None:
        """The next plan copies what another engine wishes for into slots. None: not all is here."""
        return self._loans.lend(wish)

    def abort(self, request_id: str, choice: int | None = None) -> list[TokenChunk]:
        """End a request, or one choice of it: its last chunks. Of an unknown one: nothing.

        A token that is in flight is dropped. Blocks are free at once, or when the last plan that
        names them has committed.
        """
        self._handovers.drop(request_id)
        group = self._groups.get(request_id)
        if group is None:
            return []
        chunks = []
        for sequence in [*group.live.values(), *group.unborn.values()]:
            if choice is None or sequence.choice == choice:
                chunks.append(self._abort(sequence))
        if group.unborn and group.primary not in group.live:
            self._scheduler.waiting.add(group.next_primary())
        return chunks

    def schedule(self, now: int) -> StepPlan | None:
        """The next step, or None: nothing to do, or all that could run is in flight."""
        scheduled = self._scheduler.schedule(self._next_plan, now)
        while scheduled is None and not self._flights and self._handovers.stand_back():
            scheduled = self._scheduler.schedule(self._next_plan, now)
        if scheduled is None:
            return None
        self._next_plan += 1
        plan, sequences = scheduled
        self._flights.append(Flight(plan, sequences, now))
        self._counters.step_began(now)
        return plan

    def commit(self, plan: StepPlan, result: StepResult, now: int) -> list[TokenChunk]:
        """Take in what a plan has computed: the new tokens, one chunk a choice.

        `ValueError`: it is not this plan's turn; nothing has changed.
        """
        if not self._flights:
            raise ValueError("no plan is in flight")
        flight = self._flights[0]
        flown, sequences = flight.plan, flight.sequences
        if not flown.plan_id == plan.plan_id == result.plan_id:
            raise ValueError(f"plan {flown.plan_id} is the next one to commit")
        self._flights.popleft()
        self._committed = plan.plan_id
        self._counters.step_ended(now, more=bool(self._flights))
        size = self.config.block_size
        cache = self.config.prefix_cache
        chunks: list[TokenChunk] = []
        load = Load()
        decodes = context = 0  # most rows are decodes: summed here, all at once
        exporting = bool(self._handovers.exports)
        for sequence, step, sample in zip(sequences, flown.steps, result.samples, strict=True):
            sequence.in_flight = False
            start, count = step.start, step.count
            if count == 1:
                decodes += 1
                context += start
            else:
                load.add(start, count)
            end = sequence.computed = start + count
            broken = step.samples and sample.token is None  # not numbers: nobody else's prefix
            if cache and end >= (sequence.published + 1) * size and not broken:
                self._publish(sequence, end)
            if start < sequence.prompt_length:
                self._prompt_advanced(sequence, start, sample)
            if sequence.group.unborn:
                self._fork(sequence)
            if exporting:
                self._handovers.advanced(sequence, self._next_plan)
            if step.samples and sequence.finish is None:
                chunks.append(self._accept(sequence, sample, now))
        # A plan that was scheduled while another one ran has begun when that one ended.
        if flown.steps:
            load.decodes, load.context = decodes, context
            self._scheduler.pace.learn(load, now - max(flight.scheduled, self._last_commit))
        self._last_commit = now
        self._handovers.committed(plan.plan_id)
        for holder in self._leaving.pop(plan.plan_id, ()):
            self._release(holder)
        return chunks

    def forward(
        self, now: int, ends: Listed[int], tokens: Listed[tuple[int, ...]]
    ) -> list[TokenChunk]:
        """Many decode steps at once, for a simulator: see `engine.forward`."""
        return forward(self, now, ends, tokens)

    def snapshot(self, replica_id: str, now: int) -> ReplicaSnapshot:
        """All that others may know of this engine. O(sequences)."""
        parked = self._handovers.parked()
        return take_snapshot(replica_id, now, self._scheduler, self._counters, parked)

    def check(self) -> None:
        """See `audit`."""
        audit(self)

    def _problem(self, request: Request) -> str | None:
        if request.request_id in self._groups:
            return "a request of this id is running"
        return why_never(request, self.config)

    # -- what a step brought ---------------------------------------------------------------------

    def _publish(self, sequence: Sequence, computed: int) -> None:
        """Put the blocks that have become full into the prefix cache, generated tokens included."""
        full = computed // self.config.block_size
        digests = sequence.chain_of(full, self.config.block_size, self._scheduler.hasher)
        for index in range(sequence.published, full):
            self._scheduler.pool.publish(sequence.blocks[index], digests[index])
        sequence.published = full

    def _prompt_advanced(self, sequence: Sequence, start: int, sample: Sample) -> None:
        end = min(sequence.computed, sequence.prompt_length)
        self._counters.prompt_tokens += end - start
        group = sequence.group
        goes_on = sequence.finish is None and sequence.choice == group.primary
        if goes_on and sample.prompt_logprobs:
            group.note_prompt_logprobs(start, sample.prompt_logprobs)

    def _fork(self, parent: Sequence) -> None:
        """Once the prompt is computed, other choices share its blocks, with its last token to do.

        Without a free place they wait, blockless, and find the prompt in the prefix cache later.
        """
        group, scheduler = parent.group, self._scheduler
        if parent.finish is not None or parent.computed < parent.prompt_length:
            return
        computed = parent.prompt_length - 1
        shared = parent.blocks[: -(-computed // self.config.block_size)]
        for choice, child in group.unborn.items():
            group.live[choice] = child
            if len(scheduler.running) < scheduler.places:
                scheduler.pool.share(shared)
                child.blocks = list(shared)
                child.computed = computed
                child.published = computed // self.config.block_size
                scheduler.run(child)
            else:
                scheduler.waiting.add(child)
        group.unborn.clear()

    def _accept(self, sequence: Sequence, sample: Sample, now: int) -> TokenChunk:
        """One new token of a choice that goes on."""
        sequence.note_token(now)
        token = sample.token
        if token is None:
            return self._end(sequence, Finish.NOT_FINITE)
        tokens = sequence.tokens
        position = len(tokens) - sequence.prompt_length
        tokens.append(token)
        self._counters.generated_tokens += 1
        finish = sequence.ended_by()
        cached_tokens = prompt_logprobs = begun = None
        if not sequence.reported:
            sequence.reported = True
            group = sequence.group
            cached_tokens, begun = group.cached_tokens, group.begun
            if group.request.sampling.prompt_logprobs is not None:
                prompt_logprobs = tuple(group.prompt_logprobs)
        if finish is not None:
            self._counters.finished += 1
            self._leave(sequence, finish)
        chunk = _blank_chunk()
        _fill_chunk(
            chunk,
            request_id=sequence.group.request.request_id,
            choice=sequence.choice,
            position=position,
            tokens=(token,),
            finish=finish,
            stop_token=token if finish is Finish.STOP else None,
            logprobs=None if sample.logprobs is None else (sample.logprobs,),
            prompt_logprobs=prompt_logprobs,
            cached_tokens=cached_tokens,
            begun=begun,
        )
        chunk.__class__ = TokenChunk
        made: TokenChunk = chunk
        return made

    # -- the end of a choice ---------------------------------------------------------------------

    def _abort(self, sequence: Sequence) -> TokenChunk:
        self._counters.aborted += 1
        return self._end(sequence, Finish.ABORT)

    def _end(self, sequence: Sequence, finish: Finish) -> TokenChunk:
        """It ends without another token."""
        self._leave(sequence, finish)
        return TokenChunk(
            request_id=sequence.group.request.request_id,
            choice=sequence.choice,
            position=len(sequence.tokens) - sequence.prompt_length,
            tokens=(),
            finish=finish,
        )

    def _leave(self, sequence: Sequence, finish: Finish) -> None:
        """Take a choice out of its queue; its blocks follow when no plan under way names them."""
        sequence.finish = finish
        group = sequence.group
        if group.unborn.pop(sequence.choice, None) is None:
            del group.live[sequence.choice]
            self._scheduler.remove(sequence)
            if sequence.named_by > self._committed:
                self._leaving.setdefault(sequence.named_by, []).append(sequence)
            else:
                self._release(sequence)
        if not group.live and not group.unborn:
            del self._groups[group.request.request_id]
            self._handovers.stop_export(group.request.request_id)

    def _release(self, holder: Holder) -> None:
        self._scheduler.pool.release(holder.blocks)
        self._scheduler.pool.release_host(holder.host_blocks)
        holder.blocks, holder.host_blocks = [], []
        if isinstance(holder, Sequence):
            self._scheduler.pool.release(holder.landed)
            holder.landed = []
