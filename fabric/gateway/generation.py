"""One HTTP request at work: its prompts x n choices, from the backend's chunks to text deltas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from fabric.core.errors import Failed, Unavailable
from fabric.core.request import Finish, Request, TokenChunk
from fabric.gateway.backend import Backend, Service
from fabric.gateway.call import Call
from fabric.gateway.pieces import Pieces
from fabric.gateway.stops import StopAutomaton
from fabric.gateway.text import ChoiceText, Delta, TextRules

Item = tuple[TokenChunk, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that is asked for. `requests[i]` is prompt i; choice = i * n + its own choice.

    `prompt_texts` is what `echo` puts before each answer. `generate` False: max_tokens was 0, only
    the prompt is scored, and the one token that the engine must make is dropped. `show_prompt`:
    the answer has vLLM's `prompt_logprobs` (an echo alone brings the prompt's in OpenAI's shape).
    `service_tier`: what the answer says of the tier; None: the client did not ask for one.
    """

    call: Call
    model_name: str
    fingerprint: str
    created: int
    requests: tuple[Request, ...]
    prompt_texts: tuple[str, ...]
    rules: TextRules
    pieces: Pieces
    chat: bool
    stream: bool = False
    stream_usage: bool = False
    echo: bool = False
    generate: bool = True
    show_prompt: bool = False
    service_tier: str | None = None

    @property
    def choices(self) -> int:
        """How many answers there will be."""
        return len(self.requests) * self.requests[0].sampling.n

    def answer_id(self) -> str:
        """The `id` of the answer and of each of its chunks."""
        return ("chatcmpl-" if self.chat else "cmpl-") + self.call.unique_id


class Generation:
    """The job's state: every choice's text, and the counts for `usage`."""

    def __init__(self, job: Job, backend: Backend) -> None:
        self.job = job
        self._backend = backend
        stops = StopAutomaton(job.rules.stops) if job.rules.stops else None
        self._choices = [
            ChoiceText(index, job.pieces, job.rules, stops) for index in range(job.choices)
        ]
        self._open = job.choices
        self._cached = [0] * len(job.requests)
        self.service: Service | None = None  # known with the first item

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """What each item of the backend adds, until every choice has finished.

        Closing it (or leaving it by any exception) aborts what still runs. Raises `Overloaded`,
        `Unavailable` or `RequestError`, at the first item or when a replica could not go on.
        """
        call, n = self.job.call, self.job.requests[0].sampling.n
        async with aclosing(self._items()) as items:
            async for prompt, item in items:
                found = [
                    delta
                    for chunk in item
                    if (delta := self._push(prompt, prompt * n + chunk.choice, chunk))
                ]
                if found:
                    if call.first_token_ns is None:
                        first = self.job.requests[prompt].request_id
                        self.service = self._backend.service(first)
                        call.first_token_ns = time.monotonic_ns()
                    yield found
                if self._open == 0:
                    break
        if self._open:
            raise Unavailable("The replica stopped before the answer was complete.")

    def usage(self) -> dict[str, object]:
        """OpenAI's `usage`, of all prompts and choices."""
        call = self.job.call
        self.account()
        return {
            "prompt_tokens": call.prompt_tokens,
            "completion_tokens": call.completion_tokens,
            "total_tokens": call.prompt_tokens + call.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
        }

    def account(self) -> None:
        """Bring the call's counts up to date, for `usage` and the log."""
        call = self.job.call
        call.choices = self.job.choices
        call.prompt_tokens = sum(len(request.prompt) for request in self.job.requests)
        call.cached_tokens = sum(self._cached)
        call.completion_tokens = sum(c.tokens for c in self._choices) * self.job.generate
        ends = {choice.finish or "none" for choice in self._choices}
        call.finish = ends.pop() if len(ends) == 1 else "mixed"

    def _push(self, prompt: int, index: int, chunk: TokenChunk) -> Delta | None:
        choice = self._choices[index]
        if choice.finish is not None:  # tokens after a stop string
            return None
        if chunk.finish is Finish.NOT_FINITE:
            raise Failed(f"Request {chunk.request_id}: the model's output for it is not a number.")
        if chunk.finish is Finish.ERROR or chunk.finish is Finish.ABORT:
            raise Unavailable("The replica could not go on with this request.")
        if chunk.cached_tokens is not None and chunk.choice == 0:
            self._cached[prompt] = chunk.cached_tokens
        delta = choice.push(chunk)
        if choice.finish is not None:
            self._open -= 1
            if chunk.finish is None:
                self._backend.abort_choice(chunk.request_id, chunk.choice)
        return delta

    def _items(self) -> AsyncGenerator[tuple[int, Item], None]:
        # The Protocol promises that closing the iterator aborts: it is an async generator.
        streams = [
            cast("AsyncGenerator[Item, None]", self._backend.stream(request))
            for request in self.job.requests
        ]
        return _single(streams[0]) if len(streams) == 1 else _merged(streams)


async def _single(stream: AsyncGenerator[Item, None]) -> AsyncGenerator[tuple[int, Item], None]:
    async with aclosing(stream):
        async for item in stream:
            yield 0, item


async def _merged(
    streams: list[AsyncGenerator[Item, None]],
) -> AsyncGenerator[tuple[int, Item], None]:
    """Items of all streams as they come. The queue is short: a slow reader holds the pumps."""
    queue: asyncio.Queue[tuple[int, Item | Exception | None]] = asyncio.Queue(len(streams))
    pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(streams)]
    try:
        ended = 0
        while ended < len(streams):
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                ended += 1
            else:
                yield index, item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    index: int,
    stream: AsyncGenerator[Item, None],
    queue: asyncio.Queue[tuple[int, Item | Exception | None]],
) -> None:
    try:
        async with aclosing(stream):
            async for item in cast("AsyncIterator[Item]", stream):
                await queue.put((index, item))
    except Exception as error:  # noqa: BLE001 (handed to the reader, which raises it)
        await queue.put((index, error))
    else:
        await queue.put((index, None))
