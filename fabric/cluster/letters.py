"""Pages, demands and leases as plain tuples: parts of what dispatchers report (see `reports`)."""

from __future__ import annotations

from dataclasses import astuple, fields
from typing import Any

from fabric.core.attainment import Dimension
from fabric.core.control.slo import Counts, Entry, Page
from fabric.core.lease import Demand, Flow, FlowShare, Lease, TenantShare

Row = tuple[Any, ...]


def page_row(page: Page) -> Row:
    """A ledger's page."""
    return tuple(
        (
            entry.dimension.value,
            entry.name,
            astuple(entry.minute),
            astuple(entry.ten_minutes),
            entry.sketches,
        )
        for entry in page
    )


def page_of_row(row: Row) -> Page:
    """The inverse of `page_row`."""
    return tuple(
        Entry(
            dimension=Dimension(dimension),
            name=name,
            minute=_of(Counts, minute),
            ten_minutes=_of(Counts, ten_minutes),
            sketches=sketches,
        )
        for dimension, name, minute, ten_minutes, sketches in row
    )


def demand_row(demand: Demand) -> Row:
    """What the control plane is to know."""
    return astuple(demand)


def demand_of_row(row: Row) -> Demand:
    """The inverse of `demand_row`."""
    values = _named(Demand, row)
    values["flows"] = tuple(_of(Flow, one) for one in values["flows"])
    return Demand(**values)


def lease_row(lease: Lease) -> Row:
    """What a dispatcher may do."""
    return astuple(lease)


def lease_of_row(row: Row) -> Lease:
    """The inverse of `lease_row`."""
    values = _named(Lease, row)
    values["tenants"] = tuple(_of(TenantShare, one) for one in values["tenants"])
    values["flows"] = tuple(_of(FlowShare, one) for one in values["flows"])
    return Lease(**values)


def _of(kind: Any, row: Row) -> Any:
    return kind(**_named(kind, row))


def _named(kind: Any, row: Row) -> dict[str, Any]:
    return dict(zip((field.name for field in fields(kind)), row, strict=True))
