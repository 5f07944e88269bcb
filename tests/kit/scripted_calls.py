"""`link.Calls` that end as a machine wills: a queue is the stream, futures are the calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from kit.local_replica import Killed

from fabric.cluster.wire import decode_request
from fabric.core.traffic.fetching import Fetch


class ScriptedCalls:
    """`link.Calls` as the machine wills: a queue is the stream, futures are the calls."""

    cold_starts = False

    def __init__(self) -> None:
        self.calls: dict[str, asyncio.Future[None]] = {}
        self.asked: list[asyncio.Future[None]] = []
        self.readers: list[asyncio.Queue[bytes | BaseException | None]] = []
        self.opened = 0

    def generate(
        self,
        _replica_id: str,
        request: bytes,
        _target: str | None = None,
        _epoch: int = 0,
        _fetch: Fetch | None = None,
    ) -> Any:
        """A future that the machine resolves."""
        call: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.calls[decode_request(request).request_id] = call
        return call

    async def steps(self, _replica_id: str) -> AsyncIterator[bytes]:
        """What the machine puts in; None hangs up."""
        queue: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
        self.readers.append(queue)
        self.opened += 1
        try:
            while (item := await queue.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self.readers.remove(queue)

    def abort_choice(self, _replica_id: str, _request_id: str, _choice: int) -> Any:
        """Whether it was heard: the machine says so, and draws the last chunk when it likes."""
        asked: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked.append(asked)
        return asked

    def died(self, error: Exception) -> bool:
        """As `EngineCalls` does."""
        return isinstance(error, Killed)
