"""A small real server that streams as OpenAI-compatible servers do: for tests of clients.

    async with SseServer(Behaviour(...)) as server: ... server.url, server.requests
    with running(Behaviour(...)) as server: ...        in a thread, for clients that block
    python tests/kit/sse_server.py PORT                as a process of its own

Token i has the text " t{i}".
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

MODEL = "kit"
_ERROR = json.dumps({"error": {"message": "the engine stopped", "code": 500}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the server acts. `cut_after`: breaks the connection after that many events."""

    tokens_per_event: int = 1
    delay_s: float = 0.0  # before each event
    takes_token_ids: bool = True
    natural_length: int | None = None  # ends by itself after so many tokens
    status: int = 200
    cut_after: int | None = None
    error_event_after: int | None = None
    drops_idle_connections: bool = False
    chunked: bool = True
    with_usage: bool = True


@dataclass(slots=True)
class SseServer:
    """Listens on a loopback port of its own while it is entered."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    port: int = 0
    requests: list[dict[str, Any]] = field(default_factory=list)
    connections: int = 0
    in_flight: int = 0
    in_flight_max: int = 0
    _server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                length = [
                    line.split(":")[1] for line in head if line.lower().startswith("content-l")
                ]
                body = await reader.readexactly(int(length[0])) if length else b"{}"
                self.in_flight += 1
                self.in_flight_max = max(self.in_flight, self.in_flight_max)
                try:
                    whole = await self._answer(head[0], json.loads(body), writer)
                finally:
                    self.in_flight -= 1
                if not whole or self.behaviour.drops_idle_connections:
                    break
        writer.close()

    async def _answer(self, line: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """False when the connection can't go on."""
        _, path, _ = line.split()
        if path == "/v1/models":
            _json(writer, 200, {"data": [{"id": MODEL}]})
            return True
        self.requests.append(body)
        if self.behaviour.status != 200:
            _json(writer, self.behaviour.status, {"error": {"message": "not today", "code": None}})
            return True
        if isinstance(body.get("prompt"), list) and not self.behaviour.takes_token_ids:
            _json(writer, 400, {"error": {"message": "prompt must be a string"}})
            return True
        if not body.get("stream"):
            _json(writer, 200, {"choices": [{"text": " t0"}]})
            return True
        return await self._stream(body, writer)

    async def _stream(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        chunked = self.behaviour.chunked
        framing = "Transfer-Encoding: chunked" if chunked else "Connection: close"
        writer.write(
            f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{framing}\r\n\r\n".encode()
        )
        for number, event in enumerate(self._events(body)):
            await asyncio.sleep(self.behaviour.delay_s)
            if number == self.behaviour.cut_after:
                return False
            failed = number == self.behaviour.error_event_after
            payload = f"data: {_ERROR if failed else event}\n\n".encode()
            writer.write(b"%x\r\n%s\r\n" % (len(payload), payload) if chunked else payload)
            await writer.drain()
        if chunked:
            writer.write(b"0\r\n\r\n")
        return chunked

    def _events(self, body: dict[str, Any]) -> Iterator[str]:
        for event in self._records(body):
            yield json.dumps(event)
        yield "[DONE]"

    def _records(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chat = "messages" in body
        count = body.get("max_tokens") or 5
        if self.behaviour.natural_length is not None:
            count = min(count, self.behaviour.natural_length)
        if chat:
            yield {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
        step = self.behaviour.tokens_per_event
        for start in range(0, count, step):
            text = "".join(f" t{i}" for i in range(start, min(count, start + step)))
            last = "length" if start + step >= count else None
            said = {"delta": {"content": text}} if chat else {"text": text}
            yield {"choices": [{"index": 0, "finish_reason": last, **said}], "usage": None}
        if self.behaviour.with_usage:
            prompt = len(body.get("prompt") or body.get("messages") or ())
            usage = {"prompt_tokens": prompt, "completion_tokens": count}
            yield {"choices": [], "usage": usage}


@contextlib.contextmanager
def running(behaviour: Behaviour | None = None) -> Iterator[SseServer]:
    """The server in a thread with a loop of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = SseServer(behaviour or Behaviour())
    asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_wind_down(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _wind_down(server: SseServer) -> None:
    await server.__aexit__()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def _json(writer: asyncio.StreamWriter, status: int, body: dict[str, Any]) -> None:
    text = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)


async def _until_killed(port: int) -> None:
    async with SseServer(port=port):
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_until_killed(int(sys.argv[1])))
