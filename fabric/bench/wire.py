"""A streamed HTTP/1.1 response, read with as little work as will do.

The client shares two cores with the server it measures, so its own cost is part of every figure: an
httpx stream costs about ten times as much per event (`tests/bench` checks that both read the same).
Pure: bytes and a time in, facts out. `client.py` owns the sockets.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_HEAD_BYTES = 64 << 10
MAX_ERROR_BYTES = 64 << 10
# Inside a JSON string quotes are escaped, so these can't be text that the model wrote.
_NEEDS_PARSING = re.compile(rb'"(?:usage"\s*:\s*\{|error"\s*:|finish_reason"\s*:\s*")')


class WireError(Exception):
    """The server sent something that is no HTTP/1.1 response or no event stream."""


class ResponseReader:
    """Takes one response apart: `feed` bytes as they come, get the body's bytes as they come.

    `status` is 0 until the head has arrived, with the `headers`, named in lower case. `done` once
    the body is complete. `reusable` says whether the connection can carry another request
    afterwards.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.done = False
        self.reusable = True
        self._buffer = bytearray()
        self._left: int | None = None  # body or chunk bytes still to come
        self._chunked = False
        self._to_the_end = False  # neither length nor chunks: the body ends with the connection

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises `WireError`."""
        if self._to_the_end:
            return data
        self._buffer += data
        if not self.status and not self._head():
            return b""
        if self._to_the_end:
            return self._take(len(self._buffer))
        return self._chunks() if self._chunked else self._counted()

    def end(self) -> None:
        """The peer closed. Raises `WireError` if that cuts the response short."""
        if self._to_the_end:
            self.done = True
        elif not self.done:
            raise WireError("the connection closed in the middle of a response")

    def _head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise WireError("the response's head is too long")
            return False
        lines = self._take(end + 4)[:-4].decode("latin-1").split("\r\n")
        status = re.match(r"HTTP/1\.([01]) (\d{3})", lines[0])
        if status is None:
            raise WireError(f"not an HTTP/1.1 response: {lines[0][:80]!r}")
        self.headers = headers = {
            name.strip().lower(): value.strip()
            for name, _, value in (line.partition(":") for line in lines[1:])
        }
        self.status = int(status[2])
        connection = headers.get("connection", "").lower()
        self.reusable = status[1] == "1" and connection != "close"
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if not self._chunked:
            length = headers.get("content-length")
            self._left = int(length) if length is not None else None
            self._to_the_end = length is None
            self.reusable = self.reusable and not self._to_the_end
        return True

    def _counted(self) -> bytes:
        assert self._left is not None
        body = self._take(min(self._left, len(self._buffer)))
        self._left -= len(body)
        self.done = self._left == 0
        return body

    def _chunks(self) -> bytes:
        parts = []
        while not self.done:
            if self._left is None:
                end = self._buffer.find(b"\r\n")
                if end < 0:
                    break
                line = self._take(end + 2)
                try:
                    self._left = int(line.split(b";")[0], 16)
                except ValueError:
                    raise WireError("a chunk without a length") from None
            # A chunk is followed by an empty line; the last one (length 0) too (no trailers here).
            if len(self._buffer) < self._left + 2:
                break
            part = self._take(self._left + 2)
            if not part.endswith(b"\r\n"):
                raise WireError("a chunk longer than its length")
            self.done = self._left == 0
            self._left = None
            parts.append(part[:-2])
        return b"".join(parts)

    def _take(self, count: int) -> bytes:
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken


@dataclass(slots=True)
class TokenTrace:
    """When the tokens of one completion came (ns), read off its server-sent events.

    `times`: one a content event. A server may put several tokens into one event, so the number of
    tokens is what the server's `usage` says; without one, the number of events. `replica` and
    `queue_ms`: as fabric's own headers say.
    """

    times: list[int] = field(default_factory=list)
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    ended: bool = False  # data: [DONE]
    error: str | None = None
    replica: str | None = None
    queue_ms: float | None = None
    _rest: bytes = b""

    def note_headers(self, headers: Mapping[str, str]) -> None:
        """Where it ran and how long it waited, if the server says so."""
        self.replica = headers.get("x-fabric-replica")
        with contextlib.suppress(KeyError, ValueError):
            self.queue_ms = float(headers["x-fabric-queue-ms"])

    def feed(self, data: bytes, now: int) -> None:
        """Read the events that `data` completes; all of them arrived at `now`."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line[5:].strip(), now)

    def _event(self, payload: bytes, now: int) -> None:
        if payload == b"[DONE]":
            self.ended = True
        elif self.times and not _NEEDS_PARSING.search(payload):
            self.times.append(now)
        else:
            self._parsed(payload, now)

    def _parsed(self, payload: bytes, now: int) -> None:
        """The slow path: until the first text, for usage, for errors."""
        try:
            event = json.loads(payload)
        except ValueError:
            raise WireError("an event that is not JSON") from None
        if event.get("error"):
            self.error = error_message(event)
        if usage := event.get("usage"):
            self.output_tokens = usage.get("completion_tokens")
            self.prompt_tokens = usage.get("prompt_tokens")
            details = usage.get("prompt_tokens_details") or {}
            self.cached_tokens = details.get("cached_tokens")
        for choice in event.get("choices") or ():
            if _carries_tokens(choice, first=not self.times):
                self.times.append(now)


def _carries_tokens(choice: dict[str, Any], *, first: bool) -> bool:
    """Does this event bring tokens? Their text may be empty: a special token, half a character."""
    delta = choice.get("delta")
    if choice.get("text") or (delta and delta.get("content")):
        return True
    if choice.get("finish_reason"):  # a last word without text ends a stream, but is no token
        return first
    # A chat stream opens with an event that only names the role.
    return delta is None or "role" not in delta


def error_message(body: object) -> str:
    """The message in an OpenAI-shaped (or FastAPI-shaped) error body."""
    if isinstance(body, dict):
        inner = body.get("error", body.get("detail", body))
        if isinstance(inner, dict) and "message" in inner:
            return str(inner["message"])
        return str(inner)
    return str(body)
