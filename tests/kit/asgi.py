"""An ASGI client in full control: bodies in parts, readers that stall, connections that drop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

App = Callable[..., Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Exchange:
    """One request. `leave()` drops the connection; `reading` cleared, nothing is read."""

    path: str
    parts: list[bytes]
    method: str = "POST"
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    status: int | None = None
    answer: dict[bytes, bytes] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)
    complete: bool = False
    reading: asyncio.Event = field(default_factory=asyncio.Event)
    wrote: asyncio.Event = field(default_factory=asyncio.Event)
    _left: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, app: App) -> Exchange:
        """Returns when the app has."""
        self.reading.set()
        await app(self._scope(), self._receive, self._send)
        return self

    def leave(self) -> None:
        """The client's socket is closed."""
        self._left.set()
        self.reading.set()

    def json(self) -> Any:
        """The answer's body."""
        return orjson.loads(b"".join(self.writes))

    def _scope(self) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": self.method,
            "path": self.path,
            "raw_path": self.path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"application/json"), *self.headers],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }

    async def _receive(self) -> dict[str, Any]:
        if self.parts:
            part = self.parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.parts)}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: MutableMapping[str, Any]) -> None:
        await self.reading.wait()
        if self._left.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.answer = dict(message["headers"])
        else:
            self.writes.append(message.get("body", b""))
            self.complete = not message.get("more_body", False)
        self.wrote.set()


def post(path: str, body: object, **more: Any) -> Exchange:
    """A POST of JSON."""
    return Exchange(path=path, parts=[orjson.dumps(body)], **more)


def events(text: str) -> list[Any]:
    """The events of a complete stream, without the end mark. Asserts the framing."""
    frames = text.split("\n\n")
    assert frames.pop() == "", "a stream ends with a blank line"
    assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
    assert frames.pop() == "data: [DONE]"
    return [orjson.loads(frame.removeprefix("data: ")) for frame in frames]


def client_of(app: object, **more: Any) -> httpx.AsyncClient:
    """An HTTP client that talks to `app` without a socket."""
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://fabric", **more)
