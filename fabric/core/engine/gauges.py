"""What others may know of an engine, read off its queues, its pool and its counters."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from fabric.core.engine.counters import Counters
from fabric.core.engine.pace import Load
from fabric.core.engine.scheduler import Scheduler
from fabric.core.engine.sequence import Sequence
from fabric.core.quick import quick
from fabric.core.snapshot import ReplicaSnapshot

_snapshot = quick(ReplicaSnapshot)


def take_snapshot(
    replica_id: str,
    now: int,
    scheduler: Scheduler,
    counters: Counters,
    parked: Collection[Sequence],
) -> ReplicaSnapshot:
    """O(sequences). `parked`: wait outside of the queue for their prompt's KV."""
    pool, pace, tiers = scheduler.pool, scheduler.pace, len(scheduler.config.tiers)
    running, waiting = scheduler.running.items, scheduler.waiting.items
    swapped = sum(bool(sequence.host_blocks) for sequence in waiting)
    load, left = Load(), 0
    tokens_by_tier, sequences_by_tier = [0] * tiers, [0] * tiers
    for sequence in chain(running, waiting, parked):
        rank, behind = sequence.standing.rank, len(sequence.tokens) - sequence.computed
        if sequence.landed or sequence in parked:
            behind -= sequence.prompt_length
        sequences_by_tier[rank] += 1
        left += sequence.expected_left()
        if behind > 1 or not sequence.running:
            tokens_by_tier[rank] += behind
        else:
            load.add(sequence.computed, 1)
    return _snapshot(
        replica_id=replica_id,
        taken=now,
        running=len(running),
        waiting=len(waiting) - swapped + len(parked),
        swapped=swapped,
        waiting_tokens=sum(tokens_by_tier),
        waiting_tokens_by_tier=tuple(tokens_by_tier),
        sequences_by_tier=tuple(sequences_by_tier),
        places=scheduler.places,
        output_tokens_left=left,
        step_ns=round(pace.step_ns(load)),
        token_ns=round(pace.token),
        row_ns=round(pace.row_ns(load.context // load.decodes if load.decodes else 0)),
        kv_token_bytes=scheduler.config.kv_token_bytes,
        blocks_total=pool.num_blocks,
        blocks_free=pool.free,
        blocks_cached=pool.evictable,
        host_blocks_total=pool.num_host_blocks,
        host_blocks_free=pool.host_free,
        prefix_queries_total=counters.prefix_queries,
        prefix_hits_total=counters.prefix_hits,
        preemptions_total=counters.preemptions,
        swaps_total=counters.swaps,
        preempted_tokens_total=counters.preempted_tokens,
        dropped_tokens_total=counters.dropped_tokens,
        prompt_tokens_total=counters.prompt_tokens,
        generated_tokens_total=counters.generated_tokens,
        finished_total=counters.finished,
        aborted_total=counters.aborted,
        steps_total=counters.steps,
        busy_ns_total=counters.busy_ns,
    )
