"""One HTTP client for any OpenAI-compatible endpoint, light enough to share the server's cores."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from fabric.bench.stats import Sample
from fabric.bench.wire import MAX_ERROR_BYTES, ResponseReader, TokenTrace, WireError, error_message
from fabric.core.request import Request

MAX_IDLE_CONNECTIONS = 1024
PROMPT_WORDS = (
    " time people water house world school state family country problem hand part place case week"
    " company system program question work government number night point home room mother area"
    " money story fact month lot right study book eye job word business issue side kind head"
    " service friend father power hour game line end member law car city community name president"
    " team minute idea kid body information back parent face others level office door health person"
    " art war history party result change morning reason research girl guy moment air teacher force"
    " education"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where to send requests and how to write them.

    `prompts`: "tokens" sends token ids, "text" the words that stand for them, "chat" those as a
    message to /v1/chat/completions. `exact` asks for `ignore_eos`, so that outputs have the length
    the workload says (vLLM, llama.cpp and fabric know it; OpenAI itself refuses it).
    """

    url: str
    model: str
    prompts: str = "tokens"
    exact: bool = True
    api_key: str | None = None
    timeout_s: float = 600.0

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON body of a request."""
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": request.sampling.max_tokens,
            "temperature": request.sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.exact:
            body["ignore_eos"] = request.sampling.ignore_eos
        if self.prompts == "tokens":
            body["prompt"] = list(request.prompt)
        elif self.prompts == "text":
            body["prompt"] = prompt_text(request)
        else:
            body["messages"] = [{"role": "user", "content": prompt_text(request)}]
        return body

    def wire(self, request: Request) -> bytes:
        """The whole HTTP request, made before the clock starts."""
        parts = urlsplit(self.url)
        what = "chat/completions" if self.prompts == "chat" else "completions"
        body = json.dumps(self.body(request), separators=(",", ":")).encode()
        head = [
            f"POST {parts.path.rstrip('/')}/v1/{what} HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            f"Content-Length: {len(body)}",
        ]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def prompt_text(request: Request) -> str:
    """A word a token, the same for the same id. Most tokenizers know each word as one token."""
    return " ".join(PROMPT_WORDS[token % len(PROMPT_WORDS)] for token in request.prompt)


class Client:
    """Keeps connections open between requests; `complete` streams one completion."""

    def __init__(self, endpoint: Endpoint) -> None:
        parts = urlsplit(endpoint.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http:// or https:// address: {endpoint.url}")
        self._endpoint = endpoint
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._idle: list[_Connection] = []

    async def complete(self, wire: bytes, request: Request, due: int) -> Sample:
        """Send `wire`, read the stream to its end. Never raises: what went wrong is in the sample.

        `due` (monotonic ns) is when the request should have left; latencies count from there.
        """
        trace, sent = TokenTrace(), time.monotonic_ns()
        error: str | None = None
        try:
            async with asyncio.timeout(self._endpoint.timeout_s):
                sent = await self._exchange(wire, trace)
        except TimeoutError:
            error = f"no end after {self._endpoint.timeout_s:g} s"
        except WireError as problem:
            error = str(problem)
        except OSError as problem:
            error = f"connection: {problem.strerror or type(problem).__name__}"
        return _sample(request, trace, due=due, sent=sent, error=error)

    async def close(self) -> None:
        """Close what is open."""
        while self._idle:
            self._idle.pop().abandon()

    async def _exchange(self, wire: bytes, trace: TokenTrace) -> int:
        """One request on an idle or a new connection; the time (ns) it left."""
        if self._idle:
            connection = self._idle.pop()
            try:
                return await self._on(connection, wire, trace)
            except _GoneBeforeAnswering:
                pass  # the server had closed an idle connection: not the request's fault
        return await self._on(await self._connect(), wire, trace)

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            _Connection, self._host, self._port, ssl=self._tls
        )
        return connection

    async def _on(self, connection: _Connection, wire: bytes, trace: TokenTrace) -> int:
        sent = time.monotonic_ns()
        reusable = False
        try:
            reusable = await connection.exchange(wire, trace)
        finally:
            if reusable and len(self._idle) < MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
            else:
                connection.abandon()
        return sent


class _GoneBeforeAnswering(WireError):
    """The connection closed before a byte of the response: safe to send again."""


class _Connection(asyncio.Protocol):
    """One socket, one request at a time. Reads in `data_received`: no task wakes up per event."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._reader = ResponseReader()
        self._trace = TokenTrace()
        self._refusal = bytearray()
        self._done: asyncio.Future[bool] | None = None
        self._closed = False

    async def exchange(self, wire: bytes, trace: TokenTrace) -> bool:
        """Send and read to the end; can the connection be used again?"""
        if self._closed or self._transport is None:
            raise _GoneBeforeAnswering("the connection was closed")
        self._reader, self._trace, self._refusal = ResponseReader(), trace, bytearray()
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(wire)
        return await self._done

    def abandon(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """From asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """From asyncio: read what came, note the time once."""
        now = time.monotonic_ns()
        try:
            body = self._reader.feed(data)
            if self._reader.status == 200:
                self._trace.feed(body, now)
            elif len(self._refusal) < MAX_ERROR_BYTES:
                self._refusal += body
        except WireError as problem:
            return self._fail(problem)
        if self._reader.done:
            self._finish()
        return None

    def connection_lost(self, _reason: Exception | None) -> None:
        """From asyncio."""
        self._closed = True
        if self._done is None or self._done.done():
            return
        if not self._reader.status:
            self._fail(_GoneBeforeAnswering("the server closed the connection without an answer"))
            return
        try:
            self._reader.end()
        except WireError as problem:
            self._fail(problem)
        else:
            self._finish()

    def _finish(self) -> None:
        self._trace.note_headers(self._reader.headers)
        if self._reader.status != 200:
            self._trace.error = f"HTTP {self._reader.status}: {_refusal_text(self._refusal)}"
        if self._done is not None and not self._done.done():
            self._done.set_result(self._reader.reusable and not self._closed)

    def _fail(self, problem: WireError) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(problem)


def _refusal_text(body: bytearray) -> str:
    try:
        return error_message(json.loads(body))[:200]
    except ValueError:
        return body[:200].decode("utf-8", "replace").strip()


def _sample(
    request: Request, trace: TokenTrace, *, due: int, sent: int, error: str | None
) -> Sample:
    error = error or trace.error
    if error is None and not trace.times:
        error = "the stream held no token"
    elif error is None and not trace.ended:
        error = "the stream ended without [DONE]"
    counted = trace.output_tokens if trace.output_tokens is not None else len(trace.times)
    return Sample(
        tier=request.tier,
        wanted_tokens=request.sampling.max_tokens,
        prompt_tokens=trace.prompt_tokens or len(request.prompt),
        cached_tokens=trace.cached_tokens or 0,
        output_tokens=counted,
        due=due,
        sent=sent,
        times=tuple(trace.times),
        error=error,
        replica=trace.replica,
        queue_ms=trace.queue_ms,
    )


async def find_model(url: str, api_key: str | None = None) -> str:
    """The first model that the endpoint lists. Raises `ConnectionError`, worded for a person."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=10, trust_env=False) as http:
            answer = await http.get(url.rstrip("/") + "/v1/models")
    except httpx.HTTPError as problem:
        raise ConnectionError(
            f"nothing answers at {url} ({type(problem).__name__}); is the server up?"
        ) from None
    try:
        return str(answer.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError):
        raise ConnectionError(
            f"{url}/v1/models answered {answer.status_code} and names no model; "
            "is this an OpenAI-compatible endpoint? (--model, or FABRIC_API_KEY, may be needed)"
        ) from None


async def takes_token_ids(endpoint: Endpoint) -> bool:
    """Does the endpoint accept a prompt of token ids? One short request finds out.

    Raises `ConnectionError`, worded for a person, when nothing answers it.
    """
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    body = {"model": endpoint.model, "prompt": [1000, 1001, 1002], "max_tokens": 1}
    try:
        async with httpx.AsyncClient(headers=headers, timeout=60, trust_env=False) as http:
            answer = await http.post(endpoint.url.rstrip("/") + "/v1/completions", json=body)
    except httpx.HTTPError as problem:
        raise ConnectionError(
            f"{endpoint.url} did not answer a short request ({type(problem).__name__})"
        ) from None
    return answer.status_code == 200
