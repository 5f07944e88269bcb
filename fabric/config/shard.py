"""`shard:` in the configuration, of a server or of a pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fabric.config.section import Section
from fabric.core.shard import ShardSpec


class ShardSection(Section):
    """One replica's model over several workers, tp × pp × ep of them."""

    tp: int = Field(1, ge=1, le=64, description="tensor parallel: heads, MLP columns, vocabulary")
    pp: int = Field(1, ge=1, le=64, description="pipeline stages: layers")
    ep: int = Field(1, ge=1, le=64, description="expert parallel: experts of a mixture")
    bundle: Literal["tp_group", "worker"] = Field(
        "tp_group", description="what stays on one node; worker: TP may reach over nodes"
    )

    def core(self) -> ShardSpec:
        """The core's own record."""
        return ShardSpec(tp=self.tp, pp=self.pp, ep=self.ep)
