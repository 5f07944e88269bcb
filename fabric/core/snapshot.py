"""All that one part may know of another, as of `taken` (ns)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSnapshot:
    """One engine replica. Counters (`*_total`) only grow over the replica's life.

    `*_by_tier`: a number for each tier, the most important first; empty where nothing is known.
    `step_ns`, `token_ns`, `row_ns`: what the replica reckons that a step takes, one more prompt
    token in it, one more decoding sequence in it; 0: unknown.
    """

    replica_id: str
    taken: int
    running: int = 0  # sequences that hold blocks on the device
    waiting: int = 0  # sequences that do not (new or recompute)
    swapped: int = 0  # sequences whose blocks are on the host
    waiting_tokens: int = 0  # tokens to compute until all can sample (waiting, and running prompts)
    waiting_tokens_by_tier: tuple[int, ...] = ()
    sequences_by_tier: tuple[int, ...] = ()  # that run, wait or are swapped
    places: int = 0  # sequences that can run at once; 0: unknown
    output_tokens_left: int = 0  # expected of all these sequences together
    step_ns: int = 0
    token_ns: int = 0
    row_ns: int = 0
    kv_token_bytes: int = 0  # of a token's KV, in all its workers; 0: unknown
    blocks_total: int = 0
    blocks_free: int = 0  # allocatable now: free or evictable
    blocks_cached: int = 0  # of those, evictable: they hold a reusable prefix
    host_blocks_total: int = 0
    host_blocks_free: int = 0
    prefix_queries_total: int = 0  # tokens looked up in the prefix cache
    prefix_hits_total: int = 0  # tokens found
    preemptions_total: int = 0
    swaps_total: int = 0  # preemptions that swapped (the rest recompute)
    preempted_tokens_total: int = 0  # whose KV preempted sequences had
    dropped_tokens_total: int = 0  # of those: neither swapped nor kept by others, computed again
    prompt_tokens_total: int = 0  # prompt tokens computed
    generated_tokens_total: int = 0
    finished_total: int = 0
    aborted_total: int = 0
    steps_total: int = 0
    busy_ns_total: int = 0  # time with at least one step under way


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSnapshot:
    """One pool of replicas, and what waits in front of it: what an autoscaler may know.

    `wanted`: replicas asked for last, those that start counted; `replicas`: that answer. `burn_*`:
    error-budget burn rate of the tier that is worst off (1: exactly used up). `*_total` only grow.
    `shared_queue`: what waits is for other pools too, so not all of it is computed in this one, and
    it may wait for another one.
    """

    pool: str
    taken: int
    wanted: int
    replicas: tuple[ReplicaSnapshot, ...] = ()
    queued_requests: int = 0
    queued_tokens: int = 0
    arrived_requests_total: int = 0
    arrived_tokens_total: int = 0
    burn_minute: float = 0.0
    burn_ten_minutes: float = 0.0
    shared_queue: bool = False
