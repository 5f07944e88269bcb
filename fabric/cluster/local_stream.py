"""The stream of step items between two processes of one machine: a Unix socket instead of gRPC.

    dispatcher ── connect, its name ──> replica
               <── length (4 bytes), item ── ... ── end of file: hung up, open again when needed

It halves the CPU time that the ingress takes for a token at concurrency 1 (0.95 to 0.5 ms, SSE
included), and on two cores every such moment is taken from the threads that compute the next step.
The socket lies in the run's private folder (mode 0700). Between machines Serve carries the stream.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path

LENGTH = struct.Struct("<I")
NAME_BYTES_MAX = 256
# A dispatcher that does not read lets items pile up here, then in its outbox (bounded by requests).
WRITE_BUFFER_BYTES = 1 << 20


async def listen(
    path: Path, items_for: Callable[[str], AsyncIterator[bytes]]
) -> asyncio.AbstractServer:
    """Serve `items_for(dispatcher)` to whoever connects and names itself."""

    async def serve_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            name = await reader.readuntil(b"\n")
            writer.transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
            sending = asyncio.create_task(_send(items_for(name[:-1].decode()), writer))
            # A dispatcher says nothing more; its process's end is the end of the file.
            leaving = asyncio.create_task(reader.read(1))
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
        writer.close()

    return await asyncio.start_unix_server(serve_one, path, limit=NAME_BYTES_MAX)


async def _send(items: AsyncIterator[bytes], writer: asyncio.StreamWriter) -> None:
    async with aclosing(items):  # type: ignore[type-var]
        async for item in items:
            writer.write(LENGTH.pack(len(item)) + item)
            await writer.drain()


async def connect(path: Path, dispatcher: str) -> AsyncGenerator[bytes, None]:
    """The items that the replica behind `path` has for us. Raises `OSError` if nobody listens."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        writer.write(dispatcher.encode() + b"\n")
        while True:
            try:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
            except asyncio.IncompleteReadError as end:
                if end.partial:
                    raise ConnectionError("the stream broke inside an item") from None
                return
            yield await reader.readexactly(length)
    finally:
        writer.close()
