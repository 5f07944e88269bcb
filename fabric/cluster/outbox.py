"""One dispatcher as a replica sees it: its open requests, and the tokens on their way to it.

generate() opens ──> open ── every choice finished ──> done
                      │ call cancelled: the client left      ──> abort
                      └ lease lost: 3 s without a heartbeat  ──> abort
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fabric.cluster.reports import DispatcherReport
from fabric.cluster.wire import encode_step
from fabric.core.request import Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot


@dataclass(slots=True)
class Opened:
    """A request whose call is open. `done` resolves when its last choice has finished."""

    done: asyncio.Future[None]
    choices_left: int


@dataclass(slots=True)
class Outbox:
    """Everything a replica keeps for one dispatcher. Bounded by the requests that are open."""

    dispatcher: str
    idle_s: float = 0.0  # since the last heartbeat
    quiet_s: float = 0.0  # since the last request or token
    sockets: int = 0  # streams that end when the dispatcher's process does
    report: DispatcherReport | None = None
    opened: dict[str, Opened] = field(default_factory=dict)
    closed: bool = False
    _chunks: list[TokenChunk] = field(default_factory=list)
    _snapshot: ReplicaSnapshot | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _reader: int = 0
    _hang_up: bool = False

    def open(self, request: Request) -> asyncio.Future[None]:
        """Note a request; the future resolves when its last choice has finished."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.opened[request.request_id] = Opened(done, request.choices_left)
        self.quiet_s = 0.0
        return done

    def refuse(self, request_id: str, reason: str) -> None:
        """The engine did not take the request."""
        entry = self.opened.pop(request_id, None)
        if entry is not None and not entry.done.done():
            entry.done.set_exception(ValueError(reason))

    def put(self, chunk: TokenChunk) -> None:
        """Keep a chunk for the next item; drop it if nobody waits for it any more."""
        self.quiet_s = 0.0
        entry = self.opened.get(chunk.request_id)
        if entry is None:
            return
        self._chunks.append(chunk)
        if chunk.finish is not None:
            entry.choices_left -= 1
            if not entry.choices_left:
                del self.opened[chunk.request_id]
                if not entry.done.done():
                    entry.done.set_result(None)

    def has_chunks(self) -> bool:
        """Something waits for the next item."""
        return bool(self._chunks)

    def flush(self, snapshot: ReplicaSnapshot) -> None:
        """The step is complete. An item goes out even without tokens: the dispatcher may be waiting
        for head-room, which a step of prompt tokens makes too."""
        self._snapshot = snapshot
        self._news.set()

    def hang_up(self) -> None:
        """End the stream, which has nothing to say; Serve's draining waits for open calls.

        Nothing is lost if a request is on its way: its chunks wait here for the next reader.
        """
        self._hang_up = True
        self._news.set()

    def close(self) -> None:
        """End the stream and fail the calls that are still open."""
        self.closed = True
        for entry in self.opened.values():
            if not entry.done.done():
                entry.done.set_exception(ConnectionError("the replica gave the request up"))
        self.opened.clear()
        self._news.set()

    async def items(self) -> AsyncIterator[bytes]:
        """One item a step; what accumulated, if the reader is slower. A newer reader takes over."""
        self._reader += 1
        me = self._reader
        self.quiet_s = 0.0
        self._hang_up = False
        self._news.set()  # wakes an older reader, which leaves
        while True:
            await self._news.wait()
            if self.closed or me != self._reader:
                return
            self._news.clear()
            snapshot, self._snapshot = self._snapshot, None
            if snapshot is not None:  # else the step is not complete: its chunks wait for it
                chunks, self._chunks = self._chunks, []
                yield encode_step(snapshot, chunks)
            elif self._hang_up and not self.opened:
                return
