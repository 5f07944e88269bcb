"""The parts' small frozen configs. `FabricConfig` composes them; nothing mutates them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from fabric.core.tenants import Tenant
from fabric.core.tiers import BUILT_IN, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class PreemptionCosts:
    """What getting a victim back costs, in ns: the cheaper of swapping and recomputing is done.

    Measured when an engine is loaded; a swap of 0 ns is no swap at all.
    """

    swap_ns_per_block: int = 100_000  # one way, 368 KB (SmolLM2, 16 tokens) at about 4 GB/s
    recompute_ns_per_token: int = 400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """What a step takes, in ns: where the engine's own estimate of it begins.

    Of any step; of a prompt's token; of a decoding sequence, and of a token of KV that it reads; of
    a (query, key) pair in a prompt's chunk. Measured when an engine is loaded.
    """

    step_ns: float = 8_000_000
    token_ns: float = 400_000
    decode_ns: float = 400_000
    context_ns: float = 500
    pair_ns: float = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One replica's engine. Block counts are filled in once the memory is known.

    `step_tokens`: the token budget of a step (prefill chunks and decodes together).
    `chunk_tokens`: the most prompt tokens one sequence computes in a step. Targets of the `tiers`
    (the most important first) may ask for less of both. `micro_batches`: how many plans the driver
    keeps under way (a pipeline's stages): so many share the sequences. `patience_ns`: who stood
    still for so long goes first. `group_tokens`: of a prompt that is handed over while it is
    computed in small chunks, no fewer travel at once, but for the last. `kv_token_bytes`: of a
    token's KV, in all its workers; 0: unknown.
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
    costs: StepCosts = field(default_factory=StepCosts)
    tiers: tuple[Tier, ...] = BUILT_IN
    patience_ns: int = 30_000_000_000
    group_tokens: int = 128
    kv_token_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionConfig:
    """The bounded queue in front of the engines. A request waits at most `queue_ttl_s`.

    `tenant_share`: the part of the queue that one tenant may fill.
    """

    max_queued_requests: int = 512
    max_queued_tokens: int = 1_000_000
    queue_ttl_s: float = 120.0
    tenant_share: float = 1.0
    tiers: tuple[Tier, ...] = BUILT_IN
    tenants: tuple[Tenant, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """What fetching a prefix from another replica costs: `latency_ns` and its bytes. Less than
    `min_tokens` are computed."""

    latency_ns: int = 20_000_000
    bytes_per_s: int = 200_000_000
    min_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """When a replica has head-room: fewer tokens than this wait there to be computed, and no more
    than it computes in `headroom_ns`.

    About two steps: enough to fill the next one, too little to make a second queue of it.
    `in_transit_ns`: a request sent this short before a snapshot was taken may not be in it yet.
    `choices`: among more than twice as many replicas, so many are drawn and looked at.
    `adapter_load_ns`: what it costs to run an adapter where it has not run lately. `patience_ns`:
    so long a request may wait for a replica that holds its prefix while others go before it.
    `policy`: cost, or one to compare it with: round_robin, least_requests, random, affinity.
    `fetch`: prefixes travel between replicas; None: they don't.
    """

    policy: str = "cost"

    headroom_tokens: int = 512
    headroom_ns: int = 500_000_000
    in_transit_ns: int = 5_000_000
    choices: int = 8
    block_size: int = 16
    adapter_load_ns: int = 50_000_000
    patience_ns: int = 500_000_000
    tiers: tuple[Tier, ...] = BUILT_IN
    fetch: FetchConfig | None = None

    @property
    def chunk_tokens(self) -> int:
        """Prompt tokens of a step, about."""
        return max(self.headroom_tokens // 2, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairingConfig:
    """Which prompts are computed in the prefill pool: those of which the decode pool would have
    to compute at least `min_prompt_tokens`."""

    min_prompt_tokens: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastConfig:
    """Smoothing of arrivals. Shares (0 to 1): how much of what is new is believed at once.

    `damping`: what is left of a trend after one more bucket.
    """

    bucket_s: float = 10.0
    slot_s: float = 900.0
    period_s: float = 86_400.0
    level_share: float = 0.3
    trend_share: float = 0.1
    damping: float = 0.9
    season_share: float = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalerConfig:
    """How many replicas one pool has.

    `target_utilisation`: how full replicas should be. `idle_s`: after so long without any work the
    pool goes to zero (None, or min_replicas > 0: never). `look_back_s`: time constant of measured
    load. `horizon_s`: how far ahead arrivals are foretold: a cold start and some. `drain_s`: what
    is queued should be worked off within it. `cooldown_s`: between two steps up for missed targets,
    which say that more is needed but not how much. `hold_s`: fewer replicas must have been enough
    for so long before one goes; a step down that has to be taken back doubles it, to `hold_max_s`
    at most. `gpus`: of one replica; `gpu_budget`: of the pool (None: no limit).
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_utilisation: float = 0.7
    idle_s: float | None = None
    look_back_s: float = 15.0
    horizon_s: float = 30.0
    drain_s: float = 10.0
    cooldown_s: float = 60.0
    hold_s: float = 120.0
    hold_max_s: float = 3_600.0
    gpus: int = 0
    gpu_budget: int | None = None
    forecast: ForecastConfig = field(default_factory=ForecastConfig)


class RungKind(StrEnum):
    """What a rung of the degrade ladder does without."""

    DRAFT = "draft"  # speculation drafts at most `amount` tokens a step; 0: none
    CAP = "cap"  # outputs of the least important tier end after `amount` tokens
    CHEAPER = "cheaper"  # tier `tier` is served by `version`
    SHED = "shed"  # tier `tier` is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One rung. `tier`: whom it takes from; None: nobody in particular."""

    kind: RungKind
    amount: int = 0
    tier: str | None = None
    version: str | None = None

    @property
    def name(self) -> str:
        """For counters."""
        return self.kind.value if self.tier is None else f"{self.kind.value}_{self.tier}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DegradeConfig:
    """When the ladder is climbed. Burn rates: see `attainment.Window`.

    Fewer than `least_requests` in the minute say nothing.
    """

    rungs: tuple[Rung, ...] = ()
    enter_burn: float = 10.0
    leave_burn: float = 1.0
    hold_ns: int = 10_000_000_000
    recover_ns: int = 60_000_000_000
    least_requests: int = 10
