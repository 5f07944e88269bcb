"""What a configuration says to the core's parts: one place for who serves and for who simulates."""

from __future__ import annotations

from dataclasses import replace

from fabric.config import FabricConfig
from fabric.core.configs import AdmissionConfig, EngineConfig, RouterConfig
from fabric.core.tiers import Tier

NS_PER_MS = 1_000_000
NS_PER_S = 1_000_000_000
# Tokens may wait in an engine for about two steps: one that is being planned while news of the
# last one travels, and the next.
HEADROOM_STEPS = 2


def tiers_of(config: FabricConfig) -> tuple[Tier, ...]:
    """The most important first."""
    return tuple(tier.core() for tier in config.tiers)


def admission_of(config: FabricConfig) -> AdmissionConfig:
    """The queue's own record, with the tiers and tenants that share it."""
    return replace(
        config.admission.core(),
        tiers=tiers_of(config),
        tenants=tuple(tenant.core() for tenant in config.tenants),
    )


def router_of(config: FabricConfig) -> RouterConfig:
    """The router's own record. Steps are cut so that the first tier waits for half of its target
    at most (`engine.scheduler`), so two of them take about all of it."""
    tiers = tiers_of(config)
    return RouterConfig(
        policy=config.router.policy,
        headroom_tokens=HEADROOM_STEPS * config.engine.step_tokens,
        headroom_ns=tiers[0].ttft_ms * NS_PER_MS,
        block_size=config.kv.block_size,
        tiers=tiers,
        fetch=config.kv.prefix_fetch.core() if config.kv.prefix_fetch else None,
    )


def engine_of(config: FabricConfig, known: EngineConfig) -> EngineConfig:
    """The engine's own record. `known`: what no file says, only a loaded model on its hardware:
    block counts, the context's limit, stop tokens, what steps and swaps cost."""
    return replace(
        known,
        block_size=config.kv.block_size,
        max_sequences=config.engine.max_sequences,
        step_tokens=config.engine.step_tokens,
        chunk_tokens=config.engine.chunk_tokens,
        prefix_cache=config.kv.prefix_cache,
        micro_batches=config.shard.pp,
        tiers=tiers_of(config),
        patience_ns=round(config.engine.patience_s * NS_PER_S),
    )
