"""`autoscaling:` in the configuration."""

from __future__ import annotations

from pydantic import Field, model_validator

from fabric.config.section import REPLICAS_MAX, Section
from fabric.core.configs import AutoscalerConfig


class AutoscalingSection(Section):
    """How many engine replicas there are, where their number is not fixed."""

    min_replicas: int = Field(1, ge=0, le=REPLICAS_MAX, description="0: none while nobody asks")
    max_replicas: int = Field(2, ge=1, le=REPLICAS_MAX, description="never more")
    target_utilisation: float = Field(0.7, gt=0, le=1, description="how full replicas should be")
    idle_s: float = Field(300.0, gt=0, description="without work for so long: none, if allowed")
    horizon_s: float = Field(30.0, ge=0, description="arrivals are foretold so far ahead")
    drain_s: float = Field(10.0, gt=0, description="what is queued should be worked off within it")
    cooldown_s: float = Field(60.0, ge=0, description="between two steps up for missed targets")
    hold_s: float = Field(120.0, ge=1, description="fewer were enough for so long: one goes")
    gpus: int = Field(0, ge=0, description="GPUs of one replica")
    gpu_budget: int | None = Field(None, ge=1, description="GPUs of all of them; null: no limit")

    def core(self) -> AutoscalerConfig:
        """The core's own record."""
        never = {"idle_s": None} if self.min_replicas else {}
        return AutoscalerConfig(**self.model_dump() | never)

    @model_validator(mode="after")
    def _possible(self) -> AutoscalingSection:
        if self.min_replicas > self.max_replicas:
            raise ValueError("min_replicas is above max_replicas")
        if self.gpu_budget is not None and self.gpus * max(1, self.min_replicas) > self.gpu_budget:
            raise ValueError("gpu_budget is less than the least number of replicas needs")
        return self
