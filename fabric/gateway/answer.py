"""The HTTP answer of a generation: runs the job, streams or gathers it, and notices who left.

The first item is awaited before anything is sent: a request that is not taken gets its 429 or 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import Response

from fabric.core.errors import FabricError
from fabric.gateway.errors import ClientLeft, error_body
from fabric.gateway.frames import Frames
from fabric.gateway.front import Receive, Scope, Send
from fabric.gateway.generation import Generation
from fabric.gateway.logs import log_bug
from fabric.gateway.text import Delta
from fabric.gateway.whole import Whole

EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
NO_CACHE = (b"cache-control", b"no-cache")
NO_PROXY_BUFFER = (b"x-accel-buffering", b"no")
JSON = (b"content-type", b"application/json")


class GenerationAnswer(Response):
    """An ASGI answer. Raises before the first byte; after it, an error is the last event."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation
        self._job = generation.job

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Run the job. Raises `ClientLeft` once the client has gone and all is freed."""
        task = asyncio.current_task()
        assert task is not None
        watch = _Watch(task, receive)
        try:
            async with aclosing(self._generation.deltas()) as deltas:
                if self._job.stream:
                    await self._stream(deltas, send, watch)
                else:
                    await self._whole(deltas, send, watch)
        except asyncio.CancelledError:
            if not watch.left:
                raise
            task.uncancel()
            raise ClientLeft from None
        finally:
            watch.stop()
            self._generation.account()

    async def _whole(
        self, deltas: AsyncGenerator[list[Delta], None], send: Send, watch: _Watch
    ) -> None:
        whole = Whole(self._job)
        async for found in deltas:
            whole.take(found)
        body = whole.body(self._generation.usage())
        watch.stop()
        length = (b"content-length", str(len(body)).encode())
        headers = [JSON, length, *self._served()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, deltas: AsyncGenerator[list[Delta], None], send: Send, watch: _Watch
    ) -> None:
        frames = Frames(self._job)
        first = await anext(deltas)
        headers = [EVENT_STREAM, NO_CACHE, NO_PROXY_BUFFER, *self._served()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            event = frames.of(first)
            if event:
                await send(_more(event))
            async for found in deltas:
                event = frames.of(found)
                if event:
                    await send(_more(event))
            usage = self._generation.usage() if self._job.stream_usage else None
            last = frames.end(usage)
        except Exception as error:  # noqa: BLE001 (the status is sent: the stream must tell)
            if not isinstance(error, FabricError):
                log_bug(self._job.call, error)
            last = b"data: " + error_body(error) + b"\n\n"
        watch.stop()
        await send({"type": "http.response.body", "body": last})

    def _served(self) -> list[tuple[bytes, bytes]]:
        """How the (first) request was served: tier, replica, wait, what it had to do without."""
        found = [(b"x-fabric-tier", self._job.requests[0].tier.encode())]
        service = self._generation.service
        if service is not None:
            found.append((b"x-fabric-replica", service.replica.encode()))
            if service.queue_ms is not None:
                found.append((b"x-fabric-queue-ms", b"%.1f" % service.queue_ms))
            if service.degraded:
                found.append((b"x-fabric-degraded", service.degraded.encode()))
        return found


class _Watch:
    """Waits for the client to leave, then cancels the task that works for it."""

    def __init__(self, task: asyncio.Task[object], receive: Receive) -> None:
        self.left = False
        self._task = task
        self._receive = receive
        self._watcher = asyncio.create_task(self._run())

    def stop(self) -> None:
        """The work is done; who leaves now leaves with an answer."""
        self._watcher.cancel()

    async def _run(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self._task.cancel()


def _more(body: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": body, "more_body": True}
