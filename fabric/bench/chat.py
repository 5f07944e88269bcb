"""`fabric chat`: a conversation in the terminal with any OpenAI-compatible server, streaming."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import httpx

from fabric.bench.wire import error_message

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 300.0
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What `fabric chat` was told; None leaves it to the server (`message`: a conversation)."""

    url: str
    api_key: str | None = None
    model: str | None = None
    message: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


class ChatError(Exception):
    """The server did not answer as hoped; worded for the person at the terminal."""


def chat(options: ChatOptions, source: TextIO = sys.stdin, out: TextIO = sys.stdout) -> int:
    """Talk until /exit, Ctrl-D or the end of a pipe; the exit code: 0, or 1 after an error.

    Piped, only the answers are written: no colour, no prompts, no figures.
    """
    with _http(options) as http:
        conversation = Conversation(options, http)
        try:
            conversation.find_model()
            if options.message is not None:
                return _one_answer(conversation, options.message, out)
        except ChatError as problem:
            print(f"fabric chat: {problem}", file=sys.stderr)
            return 1
        return _converse(conversation, source, out)


@dataclass(slots=True)
class Answer:
    """One answer and how fast it came. Seconds; `tokens` as the server counts them."""

    text: str = ""
    tokens: int | None = None
    started: float = 0.0
    first: float | None = None
    last: float = 0.0

    def figures(self) -> str:
        """`TTFT 31 ms · 118 tok/s · 64 tokens`; what is not known is left out."""
        if self.first is None:
            return "no tokens"
        parts = [f"TTFT {(self.first - self.started) * 1000:.0f} ms"]
        if self.tokens is not None:
            if self.tokens > 1 and self.last > self.first:
                parts.append(f"{(self.tokens - 1) / (self.last - self.first):.0f} tok/s")
            parts.append(f"{self.tokens} tokens")
        return " · ".join(parts)


@dataclass(slots=True)
class Conversation:
    """The history and the server it is held with."""

    options: ChatOptions
    http: httpx.Client
    model: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        system = self.options.system
        self.messages = [{"role": "system", "content": system}] if system else []

    def find_model(self) -> None:
        """The model to talk to: the one asked for, or the server's first. Raises `ChatError`."""
        if self.options.model:
            self.model = self.options.model
            return
        try:
            answer = self.http.get("/v1/models")
        except httpx.HTTPError as problem:
            raise ChatError(_unreachable(self.options.url, problem)) from None
        if answer.status_code != 200:
            raise ChatError(_refusal(answer.status_code, answer.content))
        try:
            self.model = str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ChatError(f"{self.options.url} is no OpenAI-compatible server") from None

    def ask(self, text: str, answer: Answer) -> Generator[str, None, None]:
        """Send the history and `text`; yields the answer's pieces. Raises `ChatError`.

        However it ends (whole, stopped by Ctrl-C, failed), the history stays one that can be
        continued: what came of the answer is kept, and a question without any answer is dropped.
        """
        self.messages.append({"role": "user", "content": text})
        answer.started = time.monotonic()
        try:
            yield from self._stream(answer)
        except httpx.HTTPError as problem:
            raise ChatError(_unreachable(self.options.url, problem)) from None
        finally:
            if answer.text:
                self.messages.append({"role": "assistant", "content": answer.text})
            else:
                self.messages.pop()

    def _stream(self, answer: Answer) -> Iterator[str]:
        with self.http.stream("POST", "/v1/chat/completions", json=self._body()) as response:
            if response.status_code != 200:
                raise ChatError(_refusal(response.status_code, response.read()))
            for event in events(response.iter_bytes()):
                if event.get("error"):
                    raise ChatError(error_message(event))
                if usage := event.get("usage"):
                    answer.tokens = usage.get("completion_tokens")
                for choice in event.get("choices") or ():
                    if piece := (choice.get("delta") or {}).get("content"):
                        answer.last = time.monotonic()
                        answer.first = answer.first or answer.last
                        answer.text += piece
                        yield piece

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.options.max_tokens is not None:
            body["max_tokens"] = self.options.max_tokens
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        return body


def events(chunks: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to [DONE]. Raises `ChatError`.

    Lines end at a newline only (RFC 8259 lets U+2028 stand in a string, where `str.splitlines`
    would cut).
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            payload = line[5:].strip() if line.startswith(b"data:") else b""
            if payload == b"[DONE]":
                return
            if payload:
                try:
                    yield json.loads(payload)
                except ValueError:
                    raise ChatError("the server sent an event that is not JSON") from None


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160))


def _converse(conversation: Conversation, source: TextIO, out: TextIO) -> int:
    terminal = source.isatty() and out.isatty()
    if terminal:
        print(f"{DIM}{conversation.model} · {COMMANDS}{PLAIN}", file=out)
    failed = False
    while (line := _read(source, out, terminal=terminal)) is not None:
        text = line.strip()
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/") and " " not in text:
            print(f"no such command; {COMMANDS}", file=sys.stderr)
        elif text:
            failed = not _answer(conversation, text, out, terminal=terminal) or failed
    # In a terminal the errors were seen; a script must be told.
    return 1 if failed and not terminal else 0


def _read(source: TextIO, out: TextIO, *, terminal: bool) -> str | None:
    """The next line; None at the end. Ctrl-C at the prompt only clears the line."""
    if not terminal:
        return source.readline() or None
    import readline  # noqa: F401  `input` then has line editing and a history

    while True:
        try:
            return input(f"\001{BOLD}\002> \001{PLAIN}\002")
        except KeyboardInterrupt:
            print(f"\n{DIM}{COMMANDS}{PLAIN}", file=out)
        except EOFError:
            print(file=out)
            return None


def _answer(conversation: Conversation, text: str, out: TextIO, *, terminal: bool) -> bool:
    """Print an answer as it comes; False if the server failed. Ctrl-C closes the stream."""
    answer, note = Answer(), ""
    pieces = conversation.ask(text, answer)
    try:
        for piece in pieces:
            print(printable(piece), end="", file=out, flush=True)
        note = answer.figures()
    except KeyboardInterrupt:
        if not terminal:
            raise
        note = "stopped"
    except ChatError as problem:
        print(f"{chr(10) if answer.text else ''}fabric chat: {problem}", file=sys.stderr)
        return False
    finally:
        pieces.close()
    print(f"\n{DIM}{note}{PLAIN}" if terminal else "", file=out, flush=True)
    return True


def _one_answer(conversation: Conversation, message: str, out: TextIO) -> int:
    return 0 if _answer(conversation, message, out, terminal=out.isatty()) else 1


def _http(options: ChatOptions) -> httpx.Client:
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return httpx.Client(base_url=options.url, headers=headers, timeout=timeout, trust_env=False)


def _unreachable(url: str, problem: httpx.HTTPError) -> str:
    if isinstance(problem, httpx.ConnectError | httpx.ConnectTimeout):
        return f"nothing answers at {url}; start a server with `fabric serve`, or give its --url"
    if isinstance(problem, httpx.TimeoutException):
        return f"{url} went silent for {READ_TIMEOUT_S:.0f} s"
    return f"the connection to {url} broke ({type(problem).__name__})"


def _refusal(status: int, body: bytes) -> str:
    try:
        said = error_message(json.loads(body))
    except ValueError:
        said = ""
    hint = {
        401: "set FABRIC_API_KEY to a key that the server knows",
        429: "the server's queue is full; try again in a moment",
        503: "the server is loading or shutting down; try again in a moment",
    }.get(status, "")
    return f"HTTP {status}: " + "; ".join(part for part in (said, hint) if part)
