"""Every call from a dispatcher to engine replicas. Nothing else knows how Serve makes them."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from fabric.cluster.local_stream import connect
from fabric.cluster.scaling import scaling_records
from fabric.core.engine.borrowing import KvWish
from fabric.core.traffic.fetching import Fetch


class EngineCalls:
    """Verbs of `EngineReplica`, by replica. `handles`: of every pool; `identity` names this
    dispatcher.

    `sockets`: the folder of `local_stream`, None on a cluster. `cold_starts`: with no replica at
    all a call waits, and Serve starts one for it. `scaled`: pools that have an autoscaler.
    """

    def __init__(
        self,
        handles: Sequence[DeploymentHandle],
        identity: str,
        sockets: Path | None,
        *,
        cold_starts: bool = False,
        scaled: Sequence[str] = (),
    ) -> None:
        self.identity = identity
        self._scaled = scaled
        self.cold_starts = cold_starts
        self._sockets = sockets
        # Bytes and plain numbers only: the cheap pickler does, cloudpickle costs 40 µs more.
        self._handles = [
            handle.options(request_serialization="pickle", response_serialization="pickle")
            for handle in handles
        ]

    def generate(
        self,
        replica_id: str,
        request: bytes,
        target: str | None = None,
        epoch: int = 0,
        fetch: Fetch | None = None,
    ) -> Any:
        """Start a request. Awaiting the result waits for its end; `cancel()` aborts it."""
        return self._call(replica_id, "generate", request, self.identity, target, epoch, fetch)

    def reserve(self, replica_id: str, request: bytes, epoch: int) -> Any:
        """A prompt's KV will come there: awaitable."""
        return self._call(replica_id, "reserve", request, self.identity, epoch)

    def give_up(self, replica_id: str, request_id: str, reason: str) -> Any:
        """No KV will come there: awaitable."""
        return self._call(replica_id, "give_up", request_id, reason)

    def steps(self, replica_id: str) -> AsyncIterator[bytes]:
        """Open the stream of step items: the short way if the replica is on this machine."""
        path = self._sockets / replica_id if self._sockets else None
        if path is not None and path.exists():
            return connect(path, self.identity)
        stream: AsyncIterator[bytes] = (
            self._handle_of(replica_id)
            .options(session_id=replica_id, method_name="steps", stream=True)
            .remote(self.identity)
        )
        return stream

    def abort_choice(self, replica_id: str, request_id: str, choice: int) -> Any:
        """Ask for the end of one choice."""
        return self._call(replica_id, "abort_choice", request_id, choice)

    async def heartbeat(self, report: bytes, timeout_s: float) -> list[bytes]:
        """Renew the lease with every replica; the reports of those that answered in time."""
        found = await asyncio.gather(
            *(self._beat(handle, report, timeout_s) for handle in self._handles),
            return_exceptions=True,
        )
        if all(isinstance(one, BaseException) for one in found):
            raise next(one for one in found if isinstance(one, BaseException))
        return [answer for one in found if isinstance(one, list) for answer in one]

    async def _beat(self, handle: DeploymentHandle, report: bytes, timeout_s: float) -> list[bytes]:
        response = handle.broadcast("heartbeat", self.identity, report)
        # Not `results_async`: with it one replica that hangs would hide the answers of the others.
        pending = await response._fetch_replica_results_async()
        answers = await asyncio.gather(
            *(asyncio.wait_for(one.get_async(), timeout_s) for one in pending),
            return_exceptions=True,
        )
        return [answer for answer in answers if isinstance(answer, bytes)]

    def died(self, error: Exception) -> bool:
        """Does a call that ended so mean that the replica's process is gone?"""
        return isinstance(error, RayActorError)

    def serving(self, replica_id: str) -> bool:
        """Does Serve send calls there? It knows of a replica that leaves before heartbeats do."""
        return any(_knows(handle, replica_id) for handle in self._handles)

    def scaling(self) -> list[dict[str, Any]]:
        """What each pool's autoscaler said last. Blocks for a millisecond."""
        return scaling_records(self._scaled)

    async def wake(self) -> None:
        """A call to no replica in particular: returns once there is one."""
        await self._handles[0].options(method_name="awake").remote()

    def _call(self, replica_id: str, method: str, *arguments: Any) -> Any:
        """Outside of the HTTP request in whose context it is made: Serve gives all calls of one the
        same id, by which its router looks for who waits. A second leg or attempt that comes while
        the first one is not forgotten there is never found, and the router searches for ever
        without giving way: nothing else runs in this process. `cancel()` is up to the caller."""
        handle = self._handle_of(replica_id).options(session_id=replica_id, method_name=method)
        return contextvars.Context().run(handle.remote, *arguments)

    def _handle_of(self, replica_id: str) -> DeploymentHandle:
        """Of the pool that has this replica; of any, whose router then says that it is gone."""
        for handle in self._handles:
            if _knows(handle, replica_id):
                return handle
        return self._handles[0]


class PoolPeer:
    """How a prefill replica calls those of the decode pool, and a borrower those that lend to it.

    By Ray's own calls, because references to objects don't survive Serve's other way."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle.options(_by_reference=True)

    def __call__(self, replica_id: str, request_id: str, references: Sequence[Any]) -> Any:
        """Awaitable: see `porter.Peer`. References nested in a list stay references."""
        call = self._handle.options(session_id=replica_id, method_name="land")
        return call.remote(request_id, list(references))

    def give_up(self, replica_id: str, request_id: str, reason: str) -> Any:
        """Awaitable: see `porter.Peer`."""
        call = self._handle.options(session_id=replica_id, method_name="give_up")
        return call.remote(request_id, reason)

    def lend(self, replica_id: str, wish: KvWish) -> Any:
        """Awaitable: see `loans.Siblings`."""
        return self._handle.options(session_id=replica_id, method_name="lend").remote(wish)

    def withdraw(self, replica_id: str, wish: KvWish) -> Any:
        """Awaitable: see `loans.Siblings`."""
        return self._handle.options(session_id=replica_id, method_name="withdraw").remote(wish)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnPool:
    """Stands for a deployment's handle where it is itself being made."""

    deployment: str
    application: str


def peer_of(peer: Any) -> Any:
    """What Serve hands to a replica's constructor, as a `porter.Peer` and `loans.Siblings`."""
    if isinstance(peer, OwnPool):
        peer = serve.get_deployment_handle(peer.deployment, peer.application)
    return PoolPeer(peer) if isinstance(peer, DeploymentHandle) else peer


def _knows(handle: DeploymentHandle, replica_id: str) -> bool:
    """Does Serve send calls to this replica of the handle's pool?"""
    router = handle._router
    if router is None:
        return False
    known = router._asyncio_router._active_request_router.curr_replicas
    return any(one.unique_id == replica_id for one in list(known))
