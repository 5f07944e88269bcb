"""`slo:` in the configuration: what is promised, and what is done without when it is in danger."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from fabric.config.section import Section
from fabric.core.configs import DegradeConfig, Rung, RungKind


class RungSection(Section):
    """One rung of the degrade ladder."""

    kind: Literal["draft", "cap", "cheaper", "shed"] = Field(
        description="shorter drafts, cap of batch's max_tokens, a cheaper version, refuse a tier"
    )
    amount: int = Field(0, ge=0, description="draft: tokens a step, 0 for none; cap: max_tokens")
    tier: str | None = Field(None, description="cheaper, shed: whose requests")
    version: str | None = Field(None, description="cheaper: where they go")

    @model_validator(mode="after")
    def _complete(self) -> RungSection:
        if (self.kind in ("cheaper", "shed")) != (self.tier is not None):
            raise ValueError("tier is for cheaper and shed, and needed there")
        if (self.kind == "cheaper") != (self.version is not None):
            raise ValueError("version is for cheaper, and needed there")
        if self.kind == "cap" and not self.amount:
            raise ValueError("cap needs an amount of at least 1")
        return self


class SloSection(Section):
    """What is promised, and what is done without when it is in danger."""

    objective: float = Field(0.99, gt=0, lt=1, description="share of requests to meet its targets")
    ladder: tuple[RungSection, ...] = Field((), description="the degrade ladder, bottom rung first")
    enter_burn: float = Field(10.0, gt=0, description="budget burn over a minute: one rung up")
    leave_burn: float = Field(1.0, gt=0, description="and below which one rung down")
    hold_s: float = Field(10.0, ge=0, description="for so long before a rung is entered")
    recover_s: float = Field(60.0, ge=0, description="for so long before it is left")

    @model_validator(mode="after")
    def _rungs_are_served(self) -> SloSection:
        """A rung that takes nothing from anybody would only hold up the next one."""
        wants = {"draft": "speculation", "cheaper": "a second version of the model"}
        for rung in self.ladder:
            if rung.kind in wants:
                raise ValueError(
                    f"slo.ladder: {rung.kind} needs {wants[rung.kind]}, and none is configured: "
                    "leave that rung out"
                )
        return self

    def degrade(self) -> DegradeConfig:
        """The core's own record."""
        return DegradeConfig(
            rungs=tuple(
                Rung(kind=RungKind(r.kind), amount=r.amount, tier=r.tier, version=r.version)
                for r in self.ladder
            ),
            enter_burn=self.enter_burn,
            leave_burn=self.leave_burn,
            hold_ns=int(self.hold_s * 1e9),
            recover_ns=int(self.recover_s * 1e9),
        )
