"""Which tier a request gets: what it asks for, or what its key allows, whichever is lower.

    header x-fabric-tier  >  body `service_tier`  >  the tenant's default tier
                              auto -> the tenant's default    priority -> interactive
                              default, scale -> standard      flex     -> batch

A tier above the key's highest is no error: the request is served at the highest one, and says so
in `x-fabric-tier` and, where the body asked, in `service_tier` (OpenAI: the tier actually used).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fabric.core.errors import RequestError
from fabric.core.tenants import Tenant
from fabric.core.tiers import Tier
from fabric.gateway.call import Call

TIER_HEADER = "x-fabric-tier"
DEADLINE_HEADER = "x-fabric-deadline-ms"
MAX_DEADLINE_MS = 86_400_000
NS_PER_MS = 1_000_000
MAX_SHOWN_CHARS = 40

AUTO = "auto"
OPENAI_NAMES: Mapping[str, str] = {
    "default": "standard",
    "scale": "standard",
    "priority": "interactive",
    "flex": "batch",
}
ANSWERED: Mapping[str, str] = {"standard": "default", "interactive": "priority", "batch": "flex"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How a request is served. `service_tier`: what the answer says, if the body asked.

    `deadline`: wall clock, ns; None: none.
    """

    tier: str
    service_tier: str | None
    deadline: int | None


class Tiering:
    """The tiers of this server, the most important first."""

    def __init__(self, tiers: tuple[Tier, ...]) -> None:
        self._ranks = {tier.name: rank for rank, tier in enumerate(tiers)}
        self._tiers = tiers

    def names(self) -> list[str]:
        """All that `service_tier` may say."""
        return [AUTO, *OPENAI_NAMES, *self._ranks]

    def service(self, asked: str | None, call: Call) -> Service:
        """Decide for one HTTP request. `asked`: its `service_tier`. Raises `RequestError`."""
        tenant = call.tenant
        wanted = tenant.default_tier
        if asked is not None:
            wanted = self._named(asked, "service_tier", tenant)
        if call.asked_tier is not None:
            wanted = self._named(call.asked_tier, TIER_HEADER, tenant)
        tier = self._tiers[max(self._ranks[wanted], self._ranks[tenant.highest_tier])]
        call.tier = tier.name
        ours = asked is not None and asked in self._ranks
        spoken = tier.name if ours else ANSWERED.get(tier.name, tier.name)
        return Service(
            tier=tier.name,
            service_tier=None if asked is None else spoken,
            deadline=_deadline(call, tier),
        )

    def _named(self, name: str, param: str, tenant: Tenant) -> str:
        wanted = tenant.default_tier if name == AUTO else OPENAI_NAMES.get(name, name)
        if wanted not in self._ranks:
            shown = name[:MAX_SHOWN_CHARS].encode("ascii", "replace").decode()
            raise RequestError(
                f"`{param}` is {shown!r}; it can be {', '.join(self.names())}.",
                param=param,
                code="invalid_value",
            )
        return wanted


def _deadline(call: Call, tier: Tier) -> int | None:
    text = call.asked_deadline_ms
    if text is None:
        patience_ms = tier.deadline_ms
    else:
        sane = text.isascii() and text.isdecimal() and len(text) < 10
        patience_ms = int(text) if sane else 0
        if not 1 <= patience_ms <= MAX_DEADLINE_MS:
            raise RequestError(
                f"`{DEADLINE_HEADER}` must be a whole number of milliseconds, 1 to "
                f"{MAX_DEADLINE_MS}.",
                param=DEADLINE_HEADER,
                code="invalid_value",
            )
    return None if patience_ms is None else call.arrival + patience_ms * NS_PER_MS
