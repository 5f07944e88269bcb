"""Which tokens run in the next step, in which blocks.

There is no prefill and no decode phase: every sequence has tokens to catch up with, and a step
gives each of them some. One pass:

    1. urgent    a waiting sequence of a strictly better class takes the place of running ones
    2. running   in order of importance; a sequence that needs one token has it reserved, the others
                 share what is left of the step's tokens and time in chunks
    3. waiting   in order of importance, while tokens, time, places and blocks last

Importance is (priority, rank of the tier, due, number): see `standing`. Who lacks a block takes it
from the least important running sequence behind it, or stands still for this step. So the most
important sequence always goes on (no livelock), and nobody is preempted but for somebody more
important.

With several micro-batches a plan takes its share of the sequences and leaves the others to the next
plan, which another stage of the pipeline works on meanwhile.
"""

from __future__ import annotations

from itertools import chain

from fabric.core.configs import EngineConfig
from fabric.core.engine.aging import AGED, Aging
from fabric.core.engine.blocks import BlockPool
from fabric.core.engine.budget import Budget, Pass
from fabric.core.engine.counters import Counters
from fabric.core.engine.pace import Pace
from fabric.core.engine.plan import (
    BlockCopy,
    KvExport,
    SequenceStep,
    StepPlan,
    blank_step,
    fill_step,
)
from fabric.core.engine.sequence import Sequence
from fabric.core.engine.standing import NS_PER_MS
from fabric.core.engine.writes import Writes
from fabric.core.ordered import Ordered
from fabric.core.prefix import Hasher

# For so long after a request of the first tier another one is expected.
FIRST_TIER_NS = 60_000_000_000


class Scheduler:
    """The two queues and the pool. `Engine` adds and removes sequences and commits results."""

    def __init__(self, config: EngineConfig, counters: Counters) -> None:
        self.config = config
        self.pace = Pace(config.costs)
        self.pool = BlockPool(num_blocks=config.num_blocks, num_host_blocks=config.num_host_blocks)
        self.writes = Writes(self.pool, config.block_size)
        self.running: Ordered[Sequence] = Ordered()
        self.waiting: Ordered[Sequence] = Ordered()
        # Every running sequence must be able to decode one token in every step.
        self.places = min(config.max_sequences, config.step_tokens)
        self.hasher = Hasher()
        self._counters = counters
        self._aging = Aging(config.patience_ns)
        # While requests of the first tier come, no step is so long that one more would be late.
        self._first_until: int | None = None
        self._first_wait_ns = config.tiers[0].ttft_ms * NS_PER_MS // 2
        # Both wait for the next plan that has a step. Copies stay in order of decision: a block is
        # read before it is given away, because whoever gets it can only be served further down.
        self._copies: list[BlockCopy] = []
        self._drops: list[int] = []
        self._exports: list[KvExport] = []
        self.must_copy = False  # another replica waits for copies: with or without a step

    def schedule(self, plan_id: int, now: int) -> tuple[StepPlan, list[Sequence]] | None:
        """The next step and the sequences of its rows, or None when nothing can run now."""
        work = Pass(plan_id, now)
        self._age(now)
        self._admit_urgent(work)
        work.budget = Budget(
            self.config,
            self.pace,
            self.running.items,
            now=now,
            longest_ns=self._first_wait_ns if self._first_comes(now) else None,
        )
        whole = self.config.micro_batches == 1
        for sequence in self.running.items:  # whoever is preempted meanwhile stands further down
            if not sequence.in_flight and (whole or self._has_row(work, len(self.running))):
                self._advance(sequence, work)
        self._admit_waiting(work)
        if not work.steps and not self.must_copy:
            return None
        plan = StepPlan(
            plan_id=plan_id,
            steps=tuple(work.steps),
            starts=tuple(work.starts),
            copies=tuple(self._copies),
            drops=tuple(self._drops),
            exports=tuple(self._exports),
        )
        self._copies.clear()
        self._drops.clear()
        self._exports.clear()
        self.must_copy = False
        return plan, work.sequences

    def run(self, sequence: Sequence) -> None:
        """Put a sequence among the running ones."""
        sequence.running = True
        self.running.add(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue; the worker may forget it with the next plan."""
        if sequence.running:
            sequence.running = False
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        if sequence.started:
            sequence.started = False
            self._drops.append(sequence.number)

    def hand_over(self, copies: list[BlockCopy], export: KvExport | None = None) -> None:
        """Copies from or to the staging area: the next plan has them, even without a step."""
        self._copies.extend(copies)
        self.must_copy = True
        if export is not None:
            self._exports.append(export)

    def _has_row(self, work: Pass, sequences: int) -> bool:
        """This plan's share of so many sequences is not used up."""
        return len(work.steps) < -(-sequences // self.config.micro_batches)

    def expect_first(self, now: int) -> None:
        """A request of the first tier has come; more may follow."""
        self._first_until = now + FIRST_TIER_NS

    def _first_comes(self, now: int) -> bool:
        return self._first_until is not None and now < self._first_until

    def _age(self, now: int) -> None:
        """Who stood still for too long goes first. Nobody's place in a pass under way changes."""
        sequence = self._aging.find(chain(self.running.items, self.waiting.items), now)
        if sequence is None:
            return
        queue = self.running if sequence.running else self.waiting
        queue.remove(sequence)
        sequence.of_class = AGED
        sequence.key = (*AGED, sequence.standing.due, sequence.number)
        queue.add(sequence)

    # -- one sequence, one step ------------------------------------------------------------------

    def _advance(self, sequence: Sequence, work: Pass) -> None:
        """Give a running sequence its tokens of this step and the blocks they are written to."""
        start = sequence.computed
        wanted = work.budget.grant(sequence)
        if wanted == 0:
            return
        count = wanted
        blocks = sequence.blocks
        known_blocks = len(blocks)
        replace: tuple[int, int] | None = None
        size = self.config.block_size
        pool = self.pool
        if (
            start + count > known_blocks * size
            or pool.refs[blocks[start // size]] > 1
            or pool.digests[blocks[start // size]] is not None
        ):
            count = self._make_room(sequence, count, work)
            work.budget.give_back(sequence, wanted - count)
            if count == 0:
                return
            copy, replace = self.writes.own_first(sequence)
            if copy is not None:
                self._copies.append(copy)
            missing = -(-(start + count) // size) - known_blocks
            if missing > 0:
                added = pool.allocate(missing)
                assert added is not None, "room was made"
                blocks.extend(added)
        new_blocks = tuple(blocks[known_blocks:]) if len(blocks) > known_blocks else ()
        tokens = sequence.tokens
        length = len(tokens)
        if not sequence.started:  # the full record says it all; nothing is left for the delta
            work.starts.append(sequence.record(work.now))
            new_blocks, replace = (), None
        step = blank_step()
        fill_step(
            step,
            sequence=sequence.number,
            epoch=sequence.epoch,
            start=start,
            count=count,
            samples=start + count == length,
            tokens=tuple(tokens[sequence.sent :]) if sequence.sent < length else (),
            blocks=new_blocks,
            replace=replace,
        )
        step.__class__ = SequenceStep
        work.steps.append(step)
        sequence.sent = length
        sequence.in_flight = True
        sequence.named_by = work.plan_id
        work.sequences.append(sequence)

    # -- when blocks run out ---------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, count: int, work: Pass) -> int:
        """How many of `count` tokens have blocks, after preempting whoever is less important."""
        while self.writes.missing(sequence, count) > self.pool.free:
            if not self._preempt_behind(sequence, work):
                break
        copies = self.writes.missing(sequence, 0)
        room = (len(sequence.blocks) + self.pool.free - copies) * self.config.block_size
        if copies > self.pool.free:
            return 0
        return max(0, min(count, room - sequence.computed))

    def _preempt_behind(self, sequence: Sequence, work: Pass) -> bool:
        """Preempt the least important running sequence behind this one. What is in flight stays."""
        for victim in reversed(self.running.items):
            if victim.key <= sequence.key:
                return False
            if not victim.in_flight:
                self._preempt(victim, work)
                return True
        return False

    def _preempt(self, victim: Sequence, work: Pass) -> None:
        """Take all blocks of a running sequence; it waits, on the host or to be computed again."""
        self.remove(victim)
        victim.epoch += 1
        self._counters.preempted_tokens += victim.computed
        copies = self.pool.swap_out(victim.blocks) if self._swap_is_cheaper(victim) else None
        if copies is not None:
            victim.host_blocks = [copy.target for copy in copies]
            victim.named_by = work.plan_id
            self._copies.extend(copies)
            self._counters.swaps += 1
        else:
            self._counters.dropped_tokens += victim.computed - self._kept_tokens(victim)
            self.pool.release(victim.blocks)
            victim.computed = 0
        victim.blocks = []
        victim.published = 0
        self.waiting.add(victim)
        self._counters.preemptions += 1
        work.preempted = True

    def _swap_is_cheaper(self, victim: Sequence) -> bool:
        """There and back over the link, or computing again all but the prefix that others keep."""
        costs = self.config.preemption
        tokens = victim.computed - self._kept_tokens(victim)
        swap_ns = 2 * len(victim.blocks) * costs.swap_ns_per_block
        return 0 < swap_ns <= tokens * costs.recompute_ns_per_token

    def _kept_tokens(self, victim: Sequence) -> int:
        """Of its tokens, the leading ones that need no computing again: others hold them."""
        return self.pool.kept(victim.blocks) * self.config.block_size

    # -- from waiting to running -----------------------------------------------------------------

    def _admit_urgent(self, work: Pass) -> None:
        """A strictly better class runs first: make room for it at the cost of worse ones."""
        waiting, running = self.waiting.items, self.running.items
        for _ in range(len(waiting)):  # who gives way does not come back in this pass
            better = running and waiting[0].may_preempt(running[-1], work.now)
            if not better or not self._clear_for(waiting[0], work):
                return
            self._admit(waiting[0], work)

    def _clear_for(self, urgent: Sequence, work: Pass) -> bool:
        """Preempt worse classes until `urgent` fits; nobody if that can't be enough."""
        victims = [
            sequence
            for sequence in reversed(self.running.items)
            if urgent.may_preempt(sequence, work.now) and not sequence.in_flight
        ]
        refs = self.pool.refs
        found = frozenset(self._lookup(urgent))
        # A block that `urgent` finds in the cache is no gain: it was not going to need another.
        held = [block for victim in victims for block in victim.blocks if block not in found]
        gain = sum(refs[block] == 1 for block in held)
        if len(self.running) - len(victims) >= self.places or self._shortage(urgent) > gain:
            return False
        for victim in victims:
            if self._fits(urgent):
                break
            self._preempt(victim, work)
        return self._fits(urgent)

    def _admit_waiting(self, work: Pass) -> None:
        """In strict order: the first one that does not fit makes the others wait for its turn."""
        waiting = self.waiting.items
        # Whoever was preempted in this very pass must not come back in it.
        while waiting and not work.preempted:
            sequence = waiting[0]
            if not work.budget.open_to(sequence) or not self._fits(sequence):
                return
            if not self._has_row(work, len(self.running) + 1):
                return
            self._admit(sequence, work)
            self._advance(sequence, work)

    def _fits(self, sequence: Sequence) -> bool:
        return len(self.running) < self.places and self._shortage(sequence) <= 0

    def _shortage(self, sequence: Sequence) -> int:
        """Blocks that are missing before this waiting sequence should run (0 or less: none).

        It needs room for its whole history. Those who go first keep what they need for theirs,
        and a block each to grow into: else whoever comes in last is preempted again at once.
        """
        size = self.config.block_size
        found = self._lookup(sequence)
        needed = -(-len(sequence.tokens) // size) - len(found)
        available = self.pool.free - sum(self.pool.refs[block] == 0 for block in found)
        for other in self.running.items:
            if other.key > sequence.key:
                break
            available -= -(-len(other.tokens) // size) - len(other.blocks) + 1
        return needed - available

    def _admit(self, sequence: Sequence, work: Pass) -> None:
        """Move a waiting sequence that fits to running, with the blocks that need no computing."""
        self.waiting.remove(sequence)
        found = self._lookup(sequence)
        self.pool.share(found)
        sequence.published = len(found)
        if sequence.host_blocks:
            self.pool.release_host(sequence.host_blocks[: len(found)])
            copies = self.pool.swap_in(sequence.host_blocks[len(found) :])
            assert copies is not None, "it fits"
            self._copies.extend(copies)
            sequence.host_blocks = []
            sequence.blocks = [*found, *(copy.target for copy in copies)]
            sequence.named_by = work.plan_id
        elif sequence.landed:
            self.pool.release(sequence.landed)
            sequence.landed = []
            sequence.blocks = list(found)
            sequence.computed = sequence.group.cached_tokens = sequence.prompt_length
            sequence.published = sequence.prompt_length // self.config.block_size
        else:
            sequence.blocks = found
            sequence.computed = len(found) * self.config.block_size
            self._count_lookup(sequence)
        self.run(sequence)

    def _lookup(self, sequence: Sequence) -> list[int]:
        """Blocks of the prefix cache that this waiting sequence can use.

        At least the last token stays to be computed, because its logits are wanted; a swapped
        sequence takes no more than it had. Prompt logprobs need every position computed.
        """
        if sequence.landed:
            return sequence.landed
        if not self.config.prefix_cache:
            return []
        size = self.config.block_size
        if sequence.host_blocks:
            full = sequence.computed // size
        elif sequence.group.request.sampling.prompt_logprobs is not None:
            full = 0
        else:
            full = (len(sequence.tokens) - 1) // size
        return self.pool.match(sequence.chain_of(full, size, self.hasher))

    def _count_lookup(self, sequence: Sequence) -> None:
        """A request is counted once, for the choice that computes its prompt."""
        group = sequence.group
        if group.cached_tokens is None:
            group.cached_tokens = min(sequence.computed, sequence.prompt_length)
            self._counters.prefix_queries += sequence.prompt_length
            self._counters.prefix_hits += group.cached_tokens
