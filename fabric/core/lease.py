"""What the control plane gives a dispatcher for about a second, and what it must know for that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """One tenant in one tier at one dispatcher.

    `served`: all the service (cost) that this dispatcher has ever charged it with; it only grows,
    up to corrections. `queued`: the cost of what could be sent at once if there were room.
    """

    tier: str
    tenant: str
    queued: int
    served: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One dispatcher, as of `taken` (ns). `lease`: the one it lives by (when that was granted).

    `running`, `offered`: requests by tenant, tenants with limits only; `offered` ever, those
    refused by a limit too.
    """

    dispatcher_id: str
    taken: int
    lease: int | None = None
    flows: tuple[Flow, ...] = ()
    running: tuple[tuple[str, int], ...] = ()
    offered: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantShare:
    """A tenant's limits at one dispatcher: its part of the tenant's own; None: no limit."""

    tenant: str
    requests_per_minute: float | None
    tokens_per_minute: float | None
    max_concurrent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowShare:
    """A flow's counter over all dispatchers, as it was when this one had charged `served`.

    It may be charged up to the counter `ceiling` before the next lease, not beyond: else a
    dispatcher whose own tenants are all far ahead would take room from where others are behind.
    """

    tier: str
    tenant: str
    served: float
    counter: float
    ceiling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """For one dispatcher. After `expires` (ns) it holds no longer; then what is left of its shares
    is what everybody can be sure of: nothing new of a limited tenant, and its own counters.

    `share`: its part (0 to 1] of what is held back and of the places to run.
    """

    dispatcher_id: str
    granted: int
    expires: int
    share: float
    tenants: tuple[TenantShare, ...] = ()
    flows: tuple[FlowShare, ...] = ()
