"""The replicas that one dispatcher knows of: who answers, who can be sent to, who is lost."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable

from fabric.cluster.link import Calls, Link, Listener
from fabric.cluster.reports import ReplicaReport, decode_replica

HEARTBEAT_TIMEOUT_S = 2.0
# A replica that has not answered for this long gets no new requests ...
SILENT_S = 5.0
# ... and after this long what it holds goes on elsewhere. Ray notices a dead process much sooner:
# this is for one that stands still, and for a node that is cut off.
LOST_S = 15.0

log = logging.getLogger("ray.serve")


class Replicas:
    """`own`: this dispatcher's report as bytes, for the heartbeat that goes out now."""

    def __init__(self, calls: Calls, listener: Listener, own: Callable[[], bytes]) -> None:
        self.links: dict[str, Link] = {}
        self.context_limit: int | None = None  # of any replica that was ever there
        self._calls = calls
        self._listener = listener
        self._own = own
        self._beat: asyncio.Task[None] | None = None

    def live(self) -> list[Link]:
        """Replicas that answer and whose loop turns."""
        oldest = time.monotonic() - SILENT_S
        return [
            link
            for link in self.links.values()
            if link.seen_s > oldest
            and not link.left
            and self._calls.serving(link.replica_id)
            and link.report
            and not link.report.stuck_s
            and not link.report.error
        ]

    def cold(self) -> bool:
        """No replica is there, none is broken, and one will be started for whoever asks."""
        if not self._calls.cold_starts or self.context_limit is None:
            return False
        return not any(self._calls.serving(name) for name in self.links)

    def why_none(self) -> str:
        """What is the matter, where none is live."""
        reports = self.reports()
        if any(report.error for report in reports):
            return "the engine failed and is being replaced"
        if any(report.stuck_s for report in reports):
            return "the engine is stuck in a step"
        return "loading" if not reports else "no replica answers"

    def reports(self) -> list[ReplicaReport]:
        """What each said last."""
        return [link.report for link in self.links.values() if link.report is not None]

    def find_context_limit(self) -> int | None:
        """The smallest of those that are there; None: none ever was."""
        limits = [report.context_limit for report in self.reports()]
        if limits:
            self.context_limit = min(limits)
        return self.context_limit

    async def refresh(self) -> None:
        """A heartbeat, or the one in hand; without an answer in time the last one counts."""
        if self._beat is None or self._beat.done():
            # Outside of any HTTP request's context: Serve would end the task with the request.
            self._beat = asyncio.get_running_loop().create_task(
                self._heartbeat(), context=contextvars.Context()
            )
        await asyncio.wait([self._beat], timeout=HEARTBEAT_TIMEOUT_S)

    def drop_lost(self) -> None:
        """Forget those that nothing was heard of for too long."""
        now = time.monotonic()
        for replica_id, link in list(self.links.items()):
            silent_s = now - max(link.seen_s, link.heard_s)
            if silent_s > (LOST_S if link.opened else SILENT_S):
                del self.links[replica_id]
                link.close()

    async def _heartbeat(self) -> None:
        try:
            answers = await self._calls.heartbeat(self._own(), HEARTBEAT_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - no replica yet, or none any more
            log.debug("no replica answers: %s", type(error).__name__)
            return
        for answer in answers:
            report = decode_replica(answer)
            replica_id = report.snapshot.replica_id
            link = self.links.get(replica_id)
            if link is None:
                link = self.links[replica_id] = Link(replica_id, self._calls, self._listener)
            link.update(report, time.monotonic())
            self.context_limit = report.context_limit
