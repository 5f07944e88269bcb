"""Every call from a dispatcher to engine replicas. Nothing else knows how Serve makes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from fabric.cluster.local_stream import connect
from fabric.cluster.scaling import scaling_record


class EngineCalls:
    """Verbs of `EngineReplica`, by replica. `identity` names this dispatcher.

    `sockets`: the folder of `local_stream`, None on a cluster. `cold_starts`: with no replica at
    all a call waits, and Serve starts one for it.
    """

    def __init__(
        self,
        handle: DeploymentHandle,
        identity: str,
        sockets: Path | None,
        *,
        cold_starts: bool = False,
    ) -> None:
        self.identity = identity
        self.cold_starts = cold_starts
        self._sockets = sockets
        # Bytes and plain numbers only: the cheap pickler does, cloudpickle costs 40 µs more.
        self._handle = handle.options(
            request_serialization="pickle", response_serialization="pickle"
        )

    def generate(self, replica_id: str, request: bytes) -> Any:
        """Start a request. Awaiting the result waits for its end; `cancel()` aborts it."""
        return self._on(replica_id, "generate").remote(request, self.identity)

    def steps(self, replica_id: str) -> AsyncIterator[bytes]:
        """Open the stream of step items: the short way if the replica is on this machine."""
        path = self._sockets / replica_id if self._sockets else None
        if path is not None and path.exists():
            return connect(path, self.identity)
        stream: AsyncIterator[bytes] = self._handle.options(
            session_id=replica_id, method_name="steps", stream=True
        ).remote(self.identity)
        return stream

    def abort_choice(self, replica_id: str, request_id: str, choice: int) -> Any:
        """Ask for the end of one choice."""
        return self._on(replica_id, "abort_choice").remote(request_id, choice)

    async def heartbeat(self, report: bytes, timeout_s: float) -> list[bytes]:
        """Renew the lease with every replica; the reports of those that answered in time."""
        response = self._handle.broadcast("heartbeat", self.identity, report)
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
        router = self._handle._router
        if router is None:
            return False
        known = router._asyncio_router._active_request_router.curr_replicas
        return any(one.unique_id == replica_id for one in list(known))

    def scaling(self) -> dict[str, Any] | None:
        """What the autoscaler said last; None: it is off. Blocks for a millisecond."""
        return scaling_record()

    async def wake(self) -> None:
        """A call to no replica in particular: returns once there is one."""
        await self._handle.options(method_name="awake").remote()

    def _on(self, replica_id: str, method: str) -> Any:
        return self._handle.options(session_id=replica_id, method_name=method)
