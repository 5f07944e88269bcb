"""Who asks: a tenant, what it may use, and its weight beside others."""

from __future__ import annotations

from dataclasses import dataclass

from fabric.core.tiers import BUILT_IN


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant. The nameless one stands for everybody without a tenant of their own.

    `highest_tier`: no request of its keys is served above it. `weight`: its share of service under
    contention, relative to other tenants. Limits are for all of its keys together, None: none.
    Tokens are those of prompt and output; `max_concurrent` requests run, further ones wait.
    """

    name: str = ""
    default_tier: str = "standard"
    highest_tier: str = BUILT_IN[0].name
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
