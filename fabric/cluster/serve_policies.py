"""Where Serve asks us: which replica gets this call? The dispatcher has decided; Serve obeys."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from fabric.cluster.link import ReplicaGone


class ChosenReplicaRouter(RequestRouter):
    """Sends a call to the replica that its `session_id` names, and nowhere else.

    A call without one (there is none in fabric, but Serve may probe) goes to any replica.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The named replica; if it is gone the call fails at once, it does not wait for another."""
        wanted = pending_request.metadata.session_id if pending_request else ""
        if not wanted:
            return [list(candidate_replicas)]
        chosen = [one for one in candidate_replicas if one.replica_id.unique_id == wanted]
        if chosen:
            return [chosen]
        if pending_request and not pending_request.future.done():
            pending_request.future.set_exception(ReplicaGone(wanted))
            # Serve takes out only whom it has found a replica for; who stays there hides others.
            self._remove_pending_request_from_indices(pending_request)
        return [list(candidate_replicas)]  # Serve sees that the future is done, and stops


def bind_replica_server_to_loopback() -> None:
    """Make this replica's gRPC server listen on 127.0.0.1; for the replica's constructor.

    Serve 2.60 starts one in every replica, always on "[::]:0", without authentication, and it
    unpickles what it gets: on a laptop in a café that would be an open door. The address is a
    literal in `Replica._on_initialized`, so the function that it is handed to is replaced, in this
    process only; tests/cluster lists the sockets and fails when a new Ray makes this futile.
    """
    import ray.serve._private.replica as serve_replica

    original = serve_replica.add_port_to_grpc_server

    def on_loopback(server: Any, address: str) -> int:
        port: int = original(server, address.replace("[::]", "127.0.0.1"))
        return port

    serve_replica.add_port_to_grpc_server = on_loopback
