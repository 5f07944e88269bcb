"""`pools:` in the configuration: prompts are computed in one pool, outputs in another."""

from __future__ import annotations

from pydantic import Field, model_validator

from fabric.config.autoscaling import AutoscalingSection
from fabric.config.section import REPLICAS_MAX, Section
from fabric.config.shard import ShardSection
from fabric.core.configs import PairingConfig


class PoolSection(Section):
    """Replicas of one kind."""

    replicas: int = Field(
        1, ge=1, le=REPLICAS_MAX, description="of this pool, where autoscaling is off"
    )
    autoscaling: AutoscalingSection | None = Field(
        None, description="of this pool alone, at least one; null: a fixed number"
    )
    shard: ShardSection = ShardSection()
    chunk_tokens: int | None = Field(
        None, ge=16, description="in place of engine.chunk_tokens; KV leaves chunk by chunk"
    )

    @property
    def first_replicas(self) -> int:
        """At start."""
        return self.autoscaling.min_replicas if self.autoscaling else self.replicas

    @property
    def most_replicas(self) -> int:
        """That may run at once."""
        return self.autoscaling.max_replicas if self.autoscaling else self.replicas

    @model_validator(mode="after")
    def _either(self) -> PoolSection:
        if self.autoscaling is None:
            return self
        if self.replicas != 1:
            raise ValueError("replicas: with autoscaling, leave it out")
        if not self.autoscaling.min_replicas:
            raise ValueError("autoscaling.min_replicas: a pool keeps at least one")
        return self


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
    def first_replicas(self) -> int:
        """Of both, at start."""
        return self.prefill.first_replicas + self.decode.first_replicas

    @property
    def most_replicas(self) -> int:
        """Of both, at once."""
        return self.prefill.most_replicas + self.decode.most_replicas

    @property
    def most_workers(self) -> int:
        """Of both, at once."""
        pools = (self.prefill, self.decode)
        return sum(pool.most_replicas * pool.shard.core().workers for pool in pools)

    @property
    def scaled(self) -> tuple[str, ...]:
        """Names of those whose number is not fixed."""
        pools = {"prefill": self.prefill, "decode": self.decode}
        return tuple(name for name, pool in pools.items() if pool.autoscaling)

    def core(self) -> PairingConfig:
        """The core's own record."""
        return PairingConfig(min_prompt_tokens=self.min_prompt_tokens)
