"""One dispatcher's line to one replica: calls that stay open, one stream for all their tokens.

request ──> Mailbox <── chunks ── stream (opened with the first request, ended by the replica
                                          after 1 s without any)
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from typing import Any, Protocol

from fabric.cluster.reports import ReplicaReport
from fabric.cluster.wire import decode_step, encode_request
from fabric.core.errors import FabricError, RequestError, Unavailable
from fabric.core.request import Finish, Request, TokenChunk
from fabric.core.snapshot import ReplicaSnapshot
from fabric.core.traffic.fetching import Fetch

REOPEN_S = 0.1
# A call ends when its last chunk is on its way: what has not come so long after that never will.
LAST_WORD_S = 10.0

log = logging.getLogger("ray.serve")


class ReplicaGone(Exception):
    """Raised by a call: the chosen replica has left since it was chosen."""


class Lost(Exception):
    """The replica can't go on with the request; another one may."""


class NotSent(Lost):
    """The request did not reach the replica."""


class Calls(Protocol):
    """What a link needs of `EngineCalls`; tests put an engine in the same process behind it."""

    cold_starts: bool

    def generate(
        self,
        replica_id: str,
        request: bytes,
        target: str | None = None,
        epoch: int = 0,
        fetch: Fetch | None = None,
    ) -> Any:
        """Awaitable, with `cancel()`. `target`: the prompt's KV goes to that replica."""
        ...

    def reserve(self, replica_id: str, request: bytes, epoch: int) -> Any:
        """A prompt's KV will come there. Awaitable: is there room?"""
        ...

    def give_up(self, replica_id: str, request_id: str, reason: str) -> Any:
        """No KV will come there. Awaitable."""
        ...

    def steps(self, replica_id: str) -> AsyncIterator[bytes]:
        """The stream."""
        ...

    def abort_choice(self, replica_id: str, request_id: str, choice: int) -> Any:
        """Awaitable."""
        ...

    async def heartbeat(self, report: bytes, timeout_s: float) -> list[bytes]:
        """Reports of all replicas."""
        ...

    def serving(self, replica_id: str) -> bool:
        """Can it be given requests, as far as Serve knows?"""
        ...

    def died(self, error: Exception) -> bool:
        """Does a call that ended so mean that the replica's process is gone?"""
        ...

    def scaling(self) -> list[dict[str, Any]]:
        """What each pool's autoscaler said last (see `scaling.ScalingPolicy`)."""
        ...

    async def wake(self) -> None:
        """Return once there is a replica; with `cold_starts` one is started for it."""
        ...


class Mailbox:
    """One request's chunks on their way to a consumer; at most max_tokens per choice wait here."""

    __slots__ = ("_chunks", "_ended", "_error", "_waiter", "abandoned", "choices_left", "stopped")

    def __init__(self, request: Request) -> None:
        self.choices_left = request.choices_left
        self.stopped: set[int] = set()  # of those left, the ones that we have asked to end
        self.abandoned: Callable[[], None] | None = None  # its consumer has gone: ends the call
        self._ended: set[int] = set()
        self._chunks: list[TokenChunk] = []
        self._error: FabricError | Lost | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, chunk: TokenChunk) -> None:
        """A chunk has come."""
        self._chunks.append(chunk)
        if chunk.finish is not None:
            self.choices_left -= 1
            self._ended.add(chunk.choice)
            self.stopped.discard(chunk.choice)
        self._wake()

    def stop(self, choice: int) -> None:
        """It was asked to end. One that has ended is not left: its last chunk may wait here."""
        if choice not in self._ended:
            self.stopped.add(choice)

    def unheard(self, choice: int) -> None:
        """It can't have been asked to end. Drawn to its end for nobody, it must be ended with the
        call."""
        self.stopped.discard(choice)
        if self.abandoned is not None and choice not in self._ended:
            self.abandoned()

    def fail(self, error: FabricError | Lost) -> None:
        """Nothing more will come."""
        if self._error is None and self.choices_left:
            self._error = error
            self._wake()

    async def take(self) -> tuple[TokenChunk, ...]:
        """All that has come since the last call; waits for something. Raises what `fail` said."""
        while not self._chunks:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks = tuple(self._chunks)
        self._chunks.clear()
        return chunks

    def pending(self) -> bool:
        """Something waits to be taken, be it an error."""
        return bool(self._chunks) or self._error is not None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Listener(Protocol):
    """Who hears of a replica."""

    def news(self) -> None:
        """There is a newer snapshot."""
        ...

    def died(self, replica_id: str, at_work: Collection[str] | None) -> None:
        """Its process or its engine has ended. `at_work`: the requests in the step that ended it;
        None: nobody knows. What was open there is told after this."""
        ...


class Link:
    """All that one dispatcher has open with one replica."""

    def __init__(self, replica_id: str, calls: Calls, listener: Listener) -> None:
        self.replica_id = replica_id
        self.calls = calls
        self.listener = listener
        self.snapshot = ReplicaSnapshot(replica_id=replica_id, taken=0)
        self.report: ReplicaReport | None = None
        self.seen_s = 0.0  # when the last heartbeat was answered, on the monotonic clock
        self.left = False  # a call has found it gone; until a heartbeat says otherwise
        self.closed = False  # nobody listens any more
        self.heard_s = 0.0  # when something last came on the stream: one that leaves still speaks
        self.opened: dict[str, Mailbox] = {}
        self._wanted = asyncio.Event()
        # Serve ties calls to the HTTP request in whose context they are made, and ends them with
        # it. The stream serves all requests: it gets a context of its own.
        self._pump = asyncio.get_running_loop().create_task(
            self._read(), context=contextvars.Context()
        )

    async def run(
        self,
        request: Request,
        target: str | None = None,
        epoch: int = 0,
        fetch: Fetch | None = None,
    ) -> AsyncGenerator[tuple[TokenChunk, ...], None]:
        """Generate. Closing the iterator aborts. Raises `Lost` if the replica fails. `target`: the
        prompt's KV goes to that replica, as attempt `epoch`. `fetch`: its prefix comes from another
        one."""
        if self.closed:  # who chose it did so before it was forgotten; it may be known again
            raise NotSent(self.replica_id)
        mailbox = Mailbox(request)
        self.opened[request.request_id] = mailbox
        self._wanted.set()
        data = encode_request(request)
        call = self.calls.generate(self.replica_id, data, target, epoch, fetch)
        watch = asyncio.get_running_loop().create_task(self._watch(call, mailbox))
        try:
            while mailbox.choices_left or mailbox.pending():
                yield await mailbox.take()
        finally:
            self.opened.pop(request.request_id, None)

            def end() -> None:
                call.cancel()
                watch.cancel()

            if mailbox.choices_left > len(mailbox.stopped):
                end()
            else:
                mailbox.abandoned = end

    def abort_choice(self, request_id: str, choice: int) -> None:
        """End one choice; what comes of it is seen on the stream. A request whose choices have all
        been asked to end is not cancelled by closing it: that would count as a client that left."""
        mailbox = self.opened.get(request_id)
        if mailbox is not None:
            mailbox.stop(choice)
        call = self.calls.abort_choice(self.replica_id, request_id, choice)
        asyncio.get_running_loop().create_task(self._ask(call, mailbox, choice))

    def update(self, report: ReplicaReport, now_s: float) -> None:
        """A heartbeat was answered."""
        self.report = report
        self.seen_s = now_s
        self.left = False
        self._note(report.snapshot)

    def lose(self) -> None:
        """What is open here must go on elsewhere."""
        for mailbox in self.opened.values():
            mailbox.fail(Lost(self.replica_id))

    def close(self) -> None:
        """Forget the replica: it has not been heard of for too long."""
        self.closed = True
        self._died(None)
        self._pump.cancel()

    def _died(self, at_work: Collection[str] | None) -> None:
        self.left = True
        self.listener.died(self.replica_id, at_work)
        self.lose()

    async def _watch(self, call: Any, mailbox: Mailbox) -> None:
        """A call that fails takes its request with it; so does one that ends well, if what it said
        last does not come."""
        try:
            await call
            if mailbox.choices_left:
                await asyncio.sleep(LAST_WORD_S)
                mailbox.fail(Lost(self.replica_id))
        except asyncio.CancelledError:
            mailbox.fail(Unavailable("The request was cancelled.", retry_after_s=1.0))
        except (ReplicaGone, ConnectionRefusedError):
            self.left = True
            mailbox.fail(NotSent(self.replica_id))
        except ConnectionError:  # it gave the request up, and lives
            mailbox.fail(Lost(self.replica_id))
        except ValueError as error:
            mailbox.fail(RequestError(str(error)))
        except Exception as error:  # noqa: BLE001 - Serve raises many kinds
            log.warning("a call to replica %s failed: %s", self.replica_id, type(error).__name__)
            if self.calls.died(error):
                self._died(None)
            mailbox.fail(Lost(self.replica_id))

    async def _ask(self, call: Any, mailbox: Mailbox | None, choice: int) -> None:
        try:
            await call
        except Exception as error:  # noqa: BLE001 - Serve raises many kinds
            log.debug("replica %s was not asked: %s", self.replica_id, type(error).__name__)
            if mailbox is not None:
                mailbox.unheard(choice)

    async def _read(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                async for item in self.calls.steps(self.replica_id):
                    self._deliver(item)
            except (ReplicaGone, OSError):
                # Nobody is there to listen to, or not any more. The calls themselves will tell what
                # has become of them: not sent, or lost.
                await asyncio.sleep(REOPEN_S)
                if self.opened:
                    self._wanted.set()
            except Exception as error:  # noqa: BLE001 - Serve raises many kinds
                log.warning("stream of replica %s broke: %s", self.replica_id, type(error).__name__)
                if self.calls.died(error):
                    self._died(None)
                self.lose()
            else:
                if self.opened:
                    self._wanted.set()  # it was opened while the replica hung up

    def _deliver(self, item: bytes) -> None:
        step = decode_step(item)
        self.heard_s = time.monotonic()
        failed = [one.request_id for one in step.chunks if one.finish is Finish.ERROR]
        for chunk in step.chunks:
            mailbox = self.opened.get(chunk.request_id)
            if mailbox is not None and chunk.finish is not Finish.ERROR:
                mailbox.put(chunk)
        if failed:
            self._died(failed)
        self._note(step.snapshot)

    def _note(self, snapshot: ReplicaSnapshot) -> None:
        if snapshot.taken > self.snapshot.taken:
            self.snapshot = snapshot
            self.listener.news()
