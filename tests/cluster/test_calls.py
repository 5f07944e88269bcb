"""Serve's own request router under `ChosenReplicaRouter`, and how calls are made to it."""

from __future__ import annotations

import asyncio
import contextvars
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.default_impl import get_request_metadata
from ray.serve._private.request_router.common import PendingRequest
from ray.serve.context import _RequestContext, _serve_request_context

from fabric.cluster.calls import EngineCalls
from fabric.cluster.link import ReplicaGone
from fabric.cluster.serve_policies import ChosenReplicaRouter

POOL = DeploymentID(name="decode")


class Replica:
    """As much of Serve's `RunningReplica` as a router asks."""

    max_ongoing_requests = 1000

    def __init__(self, name: str) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=POOL)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


class Handle:
    """A `DeploymentHandle` whose calls are what Serve would know of them."""

    _router = None

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self._options = options or {}

    def options(self, **options: Any) -> Handle:
        return Handle(self._options | options)

    def remote(self, *_arguments: Any) -> Any:
        names = ("method_name", "multiplexed_model_id", "session_id", "stream", "_by_reference")
        names += ("request_serialization", "response_serialization")
        values = {name: self._options.get(name, "") for name in names}
        init = SimpleNamespace(_source=None, _run_router_in_separate_loop=False)
        return get_request_metadata(init, SimpleNamespace(**values))


def call(replica_id: str, method: str = "generate") -> Any:
    """What Serve's router is told of a call that `EngineCalls` makes."""
    calls = EngineCalls([Handle()], "front", None)  # type: ignore[list-item]
    if method == "generate":
        return calls.generate(replica_id, b"")
    return calls.abort_choice(replica_id, "r", 0)


def in_http_request(function: Any, *arguments: Any) -> Any:
    """As Serve calls an ingress."""
    context = contextvars.Context()
    of_request = _RequestContext(request_id="http", _internal_request_id="one")
    context.run(_serve_request_context.set, of_request)
    return context.run(function, *arguments)


def test_every_call_has_an_id_of_its_own() -> None:
    made = [in_http_request(call, "d", method) for method in ("generate", "generate", "abort")]
    assert {one.session_id for one in made} == {"d"}
    assert len({one.internal_request_id for one in made} | {"one"}) == 4


@pytest.mark.timeout(60)
async def test_who_comes_after_a_call_to_one_that_is_gone_is_found() -> None:
    """Whatever id it has: a router that does not find it never gives way to anybody."""
    router = ChosenReplicaRouter(
        POOL, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
    )
    router.update_replicas([Replica("new")])  # type: ignore[list-item]
    await asyncio.sleep(0.01)  # it is asked how long its queue is
    old, new = (PendingRequest(args=[], kwargs={}, metadata=call(n)) for n in ("old", "new"))
    new.metadata.internal_request_id = old.metadata.internal_request_id
    with pytest.raises(ReplicaGone):
        await router._choose_replica_for_request(old)
    chosen = await router._choose_replica_for_request(new)
    assert chosen.replica_id.unique_id == "new"
    assert not router._pending_requests_by_id
