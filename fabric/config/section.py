"""What every part of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# More than anybody has machines for: what is beyond is a slip, and Serve would start them all.
REPLICAS_MAX = 1024


class Section(BaseModel):
    """Strict and frozen: an unknown key or a wrong type is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
