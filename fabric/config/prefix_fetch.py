"""`kv.prefix_fetch:` in the configuration: replicas fetch prefixes from each other."""

from __future__ import annotations

from pydantic import Field

from fabric.config.section import Section
from fabric.core.configs import FetchConfig

NS_PER_MS = 1_000_000


class PrefixFetchSection(Section):
    """What fetching costs, and how much of it is kept for the next one."""

    min_tokens: int = Field(128, ge=1, description="fewer that are missing are computed")
    latency_ms: float = Field(20.0, ge=0, description="what a fetch takes beside its bytes")
    bytes_per_s: int = Field(
        200_000_000, ge=1, description="KV from one replica's pool into another's"
    )
    store_bytes: int = Field(
        64 << 20,
        ge=0,
        description="what a replica has lent stays in Ray's store; beyond its memory: on disk",
    )

    def core(self) -> FetchConfig:
        """The core's own record."""
        return FetchConfig(
            latency_ns=round(self.latency_ms * NS_PER_MS),
            bytes_per_s=self.bytes_per_s,
            min_tokens=self.min_tokens,
        )
