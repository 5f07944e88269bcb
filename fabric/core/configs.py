"""The parts' small frozen configs. `FabricConfig` composes them; nothing mutates them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionCosts:
    """What getting a victim back costs, in ns: the cheaper of swapping and recomputing is done.

    Measured when an engine is loaded; a swap of 0 ns is no swap at all.
    """

    swap_ns_per_block: int = 100_000  # one way, 368 KB (SmolLM2, 16 tokens) at about 4 GB/s
    recompute_ns_per_token: int = 400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One replica's engine. Block counts are filled in once the memory is known.

    `step_tokens`: the token budget of a step (prefill chunks and decodes together).
    `chunk_tokens`: the most prompt tokens one sequence computes in a step. `micro_batches`: how
    many plans the driver keeps under way (a pipeline's stages): so many share the sequences.
    """

    block_size: int = 16
    num_blocks: int = 0
    num_host_blocks: int = 0
    max_sequences: int = 64
    step_tokens: int = 1024
    chunk_tokens: int = 1024
    context_limit: int = 2048
    prefix_cache: bool = True
    eos_token_ids: tuple[int, ...] = ()
    micro_batches: int = 1
    preemption: PreemptionCosts = field(default_factory=PreemptionCosts)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """The bounded queue in front of the engines. A request waits at most `queue_ttl_s`."""

    max_queued_requests: int = 512
    max_queued_tokens: int = 1_000_000
    queue_ttl_s: float = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """When a replica has head-room: fewer tokens than this wait there to be computed.

    About one step's budget: enough to fill the next step, too little to make a second queue of it.
    `in_transit_ns`: a request sent this short before a snapshot was taken may not be in it yet.
    """

    headroom_tokens: int = 512
    in_transit_ns: int = 5_000_000
