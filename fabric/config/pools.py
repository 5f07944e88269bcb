"""`pools:` in the configuration: prompts are computed in one pool, outputs in another."""

from __future__ import annotations

from pydantic import Field

from fabric.config.section import Section
from fabric.config.shard import ShardSection
from fabric.core.configs import PairingConfig


class PoolSection(Section):
    """Replicas of one kind."""

    replicas: int = Field(1, ge=1, description="of this pool")
    shard: ShardSection = ShardSection()
    chunk_tokens: int | None = Field(
        None, ge=16, description="in place of engine.chunk_tokens; KV leaves chunk by chunk"
    )


class PoolsSection(Section):
    """Where prompts and outputs go."""

    prefill: PoolSection = PoolSection()
    decode: PoolSection = PoolSection()
    min_prompt_tokens: int = Field(
        256, ge=1, description="fewer that the decode pool does not hold: computed there"
    )

    @property
    def shards(self) -> tuple[ShardSection, ...]:
        """Of both."""
        return self.prefill.shard, self.decode.shard

    @property
    def replicas(self) -> int:
        """Of both."""
        return self.prefill.replicas + self.decode.replicas

    @property
    def workers(self) -> int:
        """Of both."""
        pools = (self.prefill, self.decode)
        return sum(pool.replicas * pool.shard.core().workers for pool in pools)

    def core(self) -> PairingConfig:
        """The core's own record."""
        return PairingConfig(min_prompt_tokens=self.min_prompt_tokens)
