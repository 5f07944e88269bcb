"""What a front knows of its replicas holds in any order, and the search sees planted bugs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from kit.fleet_machine import FleetMachine
from kit.planting import Mutation, constant, must_find

import fabric.cluster.replicas as replicas_module
from fabric.cluster.link import Link
from fabric.cluster.replicas import LOST_S, SILENT_S, Replicas

TestReplicas = FleetMachine.TestCase
TestReplicas.settings = settings(max_examples=20, stateful_step_count=30)


def but_for(field: str, well: object) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As if that were well with everybody."""

    def wrong(original: Callable[..., Any]) -> Callable[..., Any]:
        def live(self: Replicas) -> list[Link]:
            before = {name: getattr(link, field) for name, link in self.links.items()}
            for link in self.links.values():
                setattr(link, field, well)
            found = original(self)
            for name, value in before.items():
                setattr(self.links[name], field, value)
            return list(found)

        return live

    return wrong


def one_each(_: Callable[..., Any]) -> Callable[..., Any]:
    """Everybody who asks sends a heartbeat."""

    async def refresh(self: Replicas) -> None:
        await asyncio.get_running_loop().create_task(self._heartbeat())

    return refresh


def patience(with_open_s: float, *, listens: bool) -> Any:
    """Forgets after another time, or does not hear who still speaks."""

    def wrong(_: Callable[..., Any]) -> Callable[..., Any]:
        def drop_lost(self: Replicas) -> None:
            for replica_id, link in list(self.links.items()):
                heard_s = max(link.seen_s, link.heard_s) if listens else link.seen_s
                silent_s = replicas_module.time.monotonic() - heard_s
                if silent_s > (with_open_s if link.opened else SILENT_S):
                    del self.links[replica_id]
                    link.close()

        return drop_lost

    return wrong


def and_leaves_the_line_open(_: Callable[..., Any]) -> Callable[..., Any]:
    """Whoever waits for the replica that is forgotten waits on."""

    def drop_lost(self: Replicas) -> None:
        for replica_id, link in list(self.links.items()):
            silent_s = replicas_module.time.monotonic() - max(link.seen_s, link.heard_s)
            if silent_s > (LOST_S if link.opened else SILENT_S):
                del self.links[replica_id]

    return drop_lost


def of_the_last(_: Callable[..., Any]) -> Callable[..., Any]:
    """The limit is whatever came last."""
    return lambda self: self.context_limit


PLANTED: list[Mutation] = [
    (Replicas, "live", but_for("left", False)),
    (Replicas, "live", but_for("seen_s", 1e9)),
    (Replicas, "cold", constant(False)),
    (Replicas, "why_none", constant("loading")),
    (Replicas, "refresh", one_each),
    (Replicas, "drop_lost", patience(SILENT_S, listens=True)),
    (Replicas, "drop_lost", patience(LOST_S, listens=False)),
    (Replicas, "drop_lost", and_leaves_the_line_open),
    (Replicas, "find_context_limit", of_the_last),
]


@pytest.mark.parametrize("mutation", PLANTED)
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    must_find(FleetMachine, mutation)
